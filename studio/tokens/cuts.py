"""How a text is cut before it is merged: where the engines of tiktoken and tokenizers differ.

The expression of a tokenizer says which characters stay together, and two engines read it, each with
its own tables of letters, digits and spaces. A vocabulary shows where a text was cut if every two
bytes that a cut may part make a token: those at a border of a character of several bytes first,
which never overlap, then two characters of ASCII.
"""

import json
import random
import re
import unicodedata
from functools import lru_cache
from typing import Any

from tiktoken import Encoding
from tokenizers import Tokenizer

# Where a character may stand: among letters, digits and marks, after an apostrophe, beside spaces
# and line feeds. Letters of the scripts that have small and large ones stand in more places.
_CONTEXTS = "a{0}b {0}\n{0}1 '{0}.{0}."
_MORE_CONTEXTS = "{0}a{0}\n '{0}e '{0}{0} 'l{0} 'r{0} 1{0}2 \t{0}\r\n  {0}{0} "
_CASED = 0x3000
# More than these, and the two have little in common.
MAX_ODD = 20_000
# All planes in which characters are assigned, and a sample of the others.
_PLANES = (
    range(0xD800),
    range(0xE000, 0x40000),
    range(0xE0000, 0xE1000),
    range(0x40000, 0x110000, 997),
)
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


# Characters of byte-level vocabularies, by the byte that each stands for, as bytes_to_unicode in
# https://github.com/openai/gpt-2/blob/master/src/encoder.py
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SIGNS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + index) for index, byte in enumerate(_OTHERS)
}


class Odd:
    """Finds characters that must go the slow way in texts.

    Those that this Python does not know are among them: others may know them, and compose or cut
    them in a way that is_normalized of this Python cannot tell.

    Args:
        characters: The others.
    """

    def __init__(self, characters: str) -> None:
        low = "".join(re.escape(c) for c in characters if c <= "\uffff")
        self._low = re.compile(f"[{low}{_unknown()}]")
        self._high = frozenset(_ASTRAL.findall(characters))

    def is_in(self, text: str) -> bool:
        """Tell whether a text holds any of them."""
        if self._low.search(text):
            return True
        return any(c in self._high or not _is_known(c) for c in set(_ASTRAL.findall(text)))


def _is_known(character: str) -> bool:
    return unicodedata.category(character) != "Cn"


@lru_cache(maxsize=1)
def _unknown() -> str:
    return "".join(c for c in map(chr, range(0x10000)) if not _is_known(c))


def odd_characters(expression: str, pre_tokenizer: dict[str, Any]) -> str:
    """Return the characters that the two cut differently somewhere.

    Args:
        expression: What tiktoken cuts with.
        pre_tokenizer: What tokenizers cuts with, as in tokenizer.json.

    Raises:
        ValueError: tiktoken's engine cannot read the expression.
    """
    probe = _Probe(expression, pre_tokenizer)
    size = 256
    everything = (chr(number) for plane in _PLANES for number in plane)
    characters = [character for character in everything if _is_known(character)]
    odd: list[str] = []
    for start in range(0, len(characters), size):
        chunk = characters[start : start + size]
        if len(odd) <= MAX_ODD and not probe.is_cut_alike("|".join(map(_places, chunk))):
            odd += [c for c in chunk if not probe.is_cut_alike(_places(c))]
    return "".join(odd)


def ascii_is_cut_alike(expression: str, pre_tokenizer: dict[str, Any]) -> bool:
    """Tell whether both cut texts of ASCII alike, by long random ones."""
    probe = _Probe(expression, pre_tokenizer)
    chance = random.Random(0)
    kinds = ["".join(map(chr, range(128))), "aZ1 \n'.", " \t\r\n", "'sStTrReEvVmMlLdD ", "a1.\n "]
    return all(
        probe.is_cut_alike("".join(chance.choices(kind, k=length)))
        for kind in kinds
        for length in [*range(1, 20)] * 10 + [20_000]
    )


class _Probe:
    """Both engines with a vocabulary that shows where a text was cut."""

    def __init__(self, expression: str, pre_tokenizer: dict[str, Any]) -> None:
        ascii_, tails, leads = range(0x80), range(0x80, 0xC0), range(0xC2, 0xF5)
        pairs = [(one, other) for one in (*ascii_, *tails) for other in leads]
        pairs += [(one, other) for one in tails for other in ascii_]
        plain = [(one, other) for one in ascii_ for other in ascii_]
        random.Random(0).shuffle(plain)
        tokens = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in pairs + plain]
        ranks = {token: number for number, token in enumerate(tokens)}
        self._fast = Encoding("probe", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
        model = {
            "type": "BPE",
            "vocab": {_signs(token): number for token, number in ranks.items()},
            "merges": [[SIGNS[one], SIGNS[other]] for one, other in pairs + plain],
        }
        steps = {"pre_tokenizer": pre_tokenizer, "model": model, "added_tokens": []}
        nothing = ("truncation", "padding", "normalizer", "post_processor", "decoder")
        values = {"version": "1.0", **dict.fromkeys(nothing), **steps}
        self._slow = Tokenizer.from_str(json.dumps(values))

    def is_cut_alike(self, text: str) -> bool:
        fast = self._fast.encode_ordinary(text)
        return fast == self._slow.encode(text, add_special_tokens=False).ids


def _places(character: str) -> str:
    is_cased = ord(character) < _CASED or 0xFB00 <= ord(character) <= 0xFFFF
    return (_CONTEXTS + _MORE_CONTEXTS if is_cased else _CONTEXTS).format(character)


def _signs(token: bytes) -> str:
    return "".join(SIGNS[byte] for byte in token)
