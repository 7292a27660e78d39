"""The fast path of a tokenizer: tiktoken, where it gives the same tokens as tokenizers.

Both merge the pair of lowest rank until none is left. tokenizers ranks the pairs that its file
lists; tiktoken ranks a pair by the number of the token that it makes. So they agree on every text if

- the file lists its merges in the order of the numbers that they make, parts before wholes, and
- every token, taken as a text, is merged into itself.

For assume that they part first where tiktoken merges the neighbours l, r into t and the file does
not list the pair. Every merge so far stayed within the characters of t or outside of them, so
that t alone, of which all lower ranks are merged, would stand as l, r as well, and could not become
itself. Both conditions are checked on the whole vocabulary. How a text is cut before the merging is
compared character by character (studio/tokens/cuts.py); a text with a character that is cut
differently goes the slow way. At last both read random texts and the example data.
"""

import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding
from tokenizers import Tokenizer

from studio.disk import TEMPLATES, write_whole
from studio.tokens.cuts import MAX_ODD, SIGNS, Odd, ascii_is_cut_alike, odd_characters

# Raised whenever the test below changes, so that no older verdict is believed.
TEST_VERSION = 1
_EXAMPLES = TEMPLATES / "data" / "tidemark-support.jsonl"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of the test of a tokenizer.

    Attributes:
        why_slow: Why it has no fast path, empty where it has one.
        odd: Characters that must go the slow way.
    """

    why_slow: str = ""
    odd: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What tokenizer.json says, as far as it matters here.

    Attributes:
        contents: Bytes of each token by its number; of a number that no token has, none.
        ranks: Number of each token that merging makes, by its bytes.
        added: Number of each token that is found in the text before all else.
    """

    source: str
    values: dict[str, Any]
    contents: tuple[bytes, ...]
    ranks: dict[bytes, int]
    added: dict[str, int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many bytes each token stands for."""
        return np.array([len(content) for content in self.contents], dtype=np.int64)


def read_vocabulary(source: str) -> Vocabulary | None:
    """Read a tokenizer.json; None where it is not byte-level BPE."""
    values = msgspec.json.decode(source)
    steps = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if values["model"].get("type") != "BPE" or not any(s["type"] == "ByteLevel" for s in steps):
        return None
    added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    table = values["model"]["vocab"]
    merged = {token: number for token, number in table.items() if token not in added}
    if not all(_BYTES.keys() >= set(token) for token in merged):
        return None
    ranks = {bytes(_BYTES[c] for c in token): number for token, number in merged.items()}
    contents = [b""] * (1 + max([*table.values(), *added.values()]))
    for content, number in ranks.items():
        contents[number] = content
    for text, number in added.items():
        contents[number] = text.encode()
    return Vocabulary(
        source=source, values=values, contents=tuple(contents), ranks=ranks, added=added
    )


def fast_encoding(
    vocabulary: Vocabulary, verdicts: Path | None
) -> tuple[Encoding | None, Odd, str]:
    """Return the fast path of a tokenizer, what must not go it, and why there is none.

    Args:
        vocabulary: Of the tokenizer.
        verdicts: Folder that keeps the outcome of the test by tokenizer; None keeps it in memory.

    Raises:
        MachineError: The folder cannot be written.
    """
    verdict = _known_verdict(vocabulary.source, verdicts)
    if verdict is None:
        verdict = judge(vocabulary.source)
        if verdicts is not None:
            text = msgspec.json.encode(verdict).decode()
            write_whole(_verdict_file(vocabulary.source, verdicts), text)
    if verdict.why_slow:
        return None, Odd(""), verdict.why_slow
    return _encoding(vocabulary), Odd(verdict.odd), ""


@lru_cache(maxsize=2)
def judge(source: str) -> Verdict:
    """Test whether tiktoken gives the tokens of a tokenizer.json; takes some seconds."""
    vocabulary = read_vocabulary(source)
    assert vocabulary is not None
    why = _why_unlike(vocabulary)
    if why:
        return Verdict(why_slow=why)
    expression, steps = _expression(vocabulary.values), vocabulary.values["pre_tokenizer"]
    assert expression is not None
    try:
        odd = odd_characters(expression, steps)
    # What the engine of tiktoken says of an expression that it does not know.
    except ValueError as error:
        return Verdict(why_slow=f"tiktoken cannot read the tokenizer's expression: {error}")
    if len(odd) > MAX_ODD:
        return Verdict(why_slow=f"more than {MAX_ODD} characters are cut differently.")
    if not ascii_is_cut_alike(expression, steps):
        return Verdict(why_slow="texts of ASCII are cut differently.")
    verdict, encoding = Verdict(odd=odd), _encoding(vocabulary)
    finder, whole = Odd(verdict.odd), _changed(vocabulary)
    for text in _texts(vocabulary):
        if finder.is_in(text) or not unicodedata.is_normalized("NFC", text):
            continue
        if encoding.encode(text, allowed_special="all") != whole.encode(text).ids:
            return Verdict(why_slow=f"the text {text[:40]!r} is read differently.")
    return verdict


def _known_verdict(source: str, verdicts: Path | None) -> Verdict | None:
    if verdicts is None or not _verdict_file(source, verdicts).exists():
        return None
    return msgspec.json.decode(_verdict_file(source, verdicts).read_bytes(), type=Verdict)


def _verdict_file(source: str, verdicts: Path) -> Path:
    tested = f"{TEST_VERSION} {version('tiktoken')} {version('tokenizers')} {unicodedata.unidata_version}"
    return verdicts / f"{sha256(f'{tested} {source}'.encode()).hexdigest()}.fast.json"


# ---- what the file says -----------------------------------------------------------------------


def _steps(values: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if values is None:
        return []
    return list(values[name]) if values["type"] == "Sequence" else [values]


def _why_unlike(vocabulary: Vocabulary) -> str:
    """Return what in the file tiktoken cannot follow, empty where there is nothing."""
    values, model = vocabulary.values, vocabulary.values["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(name) for name in (*options, "fuse_unk", "byte_fallback")):
        return "the merging has options that tiktoken does not know."
    if any(step["type"] != "NFC" for step in _steps(values.get("normalizer"), "normalizers")):
        return "the text is normalised in another way than NFC."
    post = _steps(values.get("post_processor"), "processors")
    if any(step["type"] == "ByteLevel" and step["trim_offsets"] for step in post):
        return "spaces are left out of the places of tokens."
    if _expression(values) is None:
        return "the text is not cut by one regular expression."
    if len({*_BYTES.values()} - {b[0] for b in vocabulary.ranks if len(b) == 1}):
        return "the vocabulary lacks single bytes."
    return _why_unlike_added(vocabulary) or _why_unlike_merges(vocabulary)


def _expression(values: dict[str, Any]) -> str | None:
    """Return the regular expression that cuts the text, if that is all that cuts it."""
    match _steps(values["pre_tokenizer"], "pretokenizers"):
        case [
            {
                "type": "Split",
                "pattern": {"Regex": str(expression)},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return expression
    return None


def _why_unlike_added(vocabulary: Vocabulary) -> str:
    tokens = vocabulary.values.get("added_tokens", [])
    if any(token[flag] for token in tokens for flag in ("lstrip", "rstrip", "single_word")):
        return "an added token takes spaces beside it."
    texts = [token["content"] for token in tokens]
    for text in texts:
        if any(text in other for other in texts if other != text):
            return f"the added token {text!r} is a part of another."
        ends = tuple(text[start:] for start in range(1, len(text)))
        if any(other.startswith(ends) for other in texts):
            return f"the added token {text!r} ends as another begins."
    return ""


def _why_unlike_merges(vocabulary: Vocabulary) -> str:
    model = vocabulary.values["model"]
    table, last = model["vocab"], -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        number = table.get(left + right, -1)
        parts = [table[part] for part in (left, right) if len(part) > 1]
        if number <= max([last, *parts]) or left + right in vocabulary.added:
            return f"the merge of {left!r} and {right!r} is not in the order of its number."
        last = number
    bare = _changed(vocabulary, normalizer=None, pre_tokenizer=None, added_tokens=[])
    tokens = [token for token in table if token not in vocabulary.added]
    for token, encoding in zip(tokens, bare.encode_batch(tokens), strict=True):
        if encoding.ids != [table[token]]:
            return f"the token {token!r} is not merged into itself."
    return ""


def _changed(vocabulary: Vocabulary, **changes: Any) -> Tokenizer:
    """Return the tokenizer with other steps; its model merges even what is one token as a whole."""
    model = {**vocabulary.values["model"], "ignore_merges": False}
    values = {**vocabulary.values, "model": model, "post_processor": None, **changes}
    return Tokenizer.from_str(json.dumps(values))


def _encoding(vocabulary: Vocabulary) -> Encoding:
    expression = _expression(vocabulary.values)
    assert expression is not None
    return Encoding(
        "fast",
        pat_str=expression,
        mergeable_ranks=vocabulary.ranks,
        special_tokens=vocabulary.added,
    )


# ---- what both make of texts ------------------------------------------------------------------


def _texts(vocabulary: Vocabulary) -> Iterator[str]:
    """Yield texts that hold all kinds of tokens, spaces and marks side by side."""
    yield from _EXAMPLES.read_text(encoding="utf-8").splitlines()
    chance = random.Random(TEST_VERSION)
    words = [content.decode("utf-8", errors="ignore") for content in vocabulary.contents]
    spaces = [" ", "  ", " " * 7, "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000"]
    signs = [*"'\"<|>/_.,!?-=+#`0123456789", "'s", "'LL", "\u2019", "\u00e9", "\U0001f30a"]
    for _ in range(4000):
        parts = chance.choices(words, k=12) + chance.choices(spaces, k=4)
        parts += chance.choices(signs, k=4) + chance.choices([*vocabulary.added, ""], k=2)
        chance.shuffle(parts)
        yield unicodedata.normalize("NFC", "".join(parts))


_BYTES = {sign: byte for byte, sign in SIGNS.items()}
