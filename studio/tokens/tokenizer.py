"""The tokenizer of a model, as its folder has it: texts to tokens, and where each token begins.

Only the `tokenizers` library reads tokenizer.json. Where a second library, tiktoken, provably gives
the same tokens (studio/tokens/bpe.py), it does the work: it is several times faster.
Not covered: tokenizers that are not byte-level BPE (sentencepiece, WordPiece); both families that
the studio trains are.
"""

import json
import unicodedata
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding
from tokenizers import Tokenizer

from studio.disk import TEMPLATES
from studio.errors import InputError
from studio.tokens.bpe import fast_encoding, read_vocabulary
from studio.tokens.cuts import Odd

Ids = NDArray[np.uint32]
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTokenizer:
    """What turns texts into the tokens of one model.

    Attributes:
        template: Jinja source of the chat template.
        sha256: Of tokenizer.json and template: who has the same reads the same.
        end_of_text: Token that ends a text which is no conversation, None where there is none.
        why_slow: Why the fast path is not taken, empty where it is.
    """

    template: str = field(repr=False)
    sha256: str
    end_of_text: int | None
    why_slow: str
    _tokenizer: Tokenizer = field(repr=False)
    _bytes: tuple[bytes, ...] = field(repr=False)
    _lengths: NDArray[np.int64] = field(repr=False)
    _encoding: Encoding | None = field(repr=False)
    _odd: Odd = field(repr=False)

    @property
    def fast(self) -> bool:
        """Whether the fast path is taken."""
        return self._encoding is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return len(self._bytes)

    def encode(self, text: str) -> tuple[Ids, Ids]:
        """Return the tokens of a text, and at which character each begins.

        A token that holds only a part of a character begins at that character.
        """
        if self._encoding is None or not self._is_even(text):
            return self.encode_slowly(text)
        try:
            tokens: Ids = self._encoding.encode_to_numpy(
                text, allowed_special="all", disallowed_special=()
            )
        # Its engine gives up on some 100,000 spaces in a row.
        except ValueError:
            return self.encode_slowly(text)
        return tokens, _character_starts(text, self._lengths[tokens])

    def encode_slowly(self, text: str) -> tuple[Ids, Ids]:
        """Return the same as `encode`, by the library that the tokenizer is written for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        return np.array(encoding.ids, dtype=np.uint32), np.array(starts, dtype=np.uint32)

    def decode_token(self, token: int) -> str:
        """Return the text of one token; bytes that are no whole character become U+FFFD."""
        return self._bytes[token].decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        """Return the number of a token that is written as such, None where there is none."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def _is_even(self, text: str) -> bool:
        """Tell whether both libraries are known to read every character of a text alike."""
        if text.isascii():
            return True
        return unicodedata.is_normalized("NFC", text) and not self._odd.is_in(text)


def load(folder: Path, verdicts: Path | None = None) -> ModelTokenizer:
    """Read the tokenizer and the chat template of a model.

    Args:
        folder: Holds tokenizer.json and chat_template.jinja or tokenizer_config.json.
        verdicts: Folder that keeps whether the fast path may be taken, by tokenizer; without it the
            self-test (a few seconds) runs once in each process.

    Raises:
        InputError: A file is missing or cannot be read, or the tokenizer is not byte-level.
    """
    source = _read(folder / "tokenizer.json", "Choose a model folder that has its tokenizer.")
    config = _config(folder)
    template = _template(folder, config)
    tokenizer = _parse(source, folder)
    vocabulary = read_vocabulary(source)
    if vocabulary is None:
        raise InputError(
            f"The tokenizer in {folder.name} is not byte-level BPE.",
            "Choose a model of the Qwen3-Next or Qwen3.5 family.",
        )
    encoding, odd, why_slow = fast_encoding(vocabulary, verdicts)
    eos = config.get("eos_token")
    ends = (_END_OF_TEXT, eos.get("content") if isinstance(eos, dict) else eos)
    known = (tokenizer.token_to_id(end) for end in ends if isinstance(end, str))
    return ModelTokenizer(
        template=template,
        sha256=_hash(source, template),
        end_of_text=next((number for number in known if number is not None), None),
        why_slow=why_slow,
        _tokenizer=tokenizer,
        _bytes=vocabulary.contents,
        _lengths=vocabulary.lengths,
        _encoding=encoding,
        _odd=odd,
    )


def tokenizer_sha256(folder: Path) -> str:
    """Return `ModelTokenizer.sha256` without loading the tokenizer.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    source = _read(folder / "tokenizer.json", "Choose a model folder that has its tokenizer.")
    return _hash(source, _template(folder, _config(folder)))


def _hash(source: str, template: str) -> str:
    return sha256(source.encode() + b"\0" + template.encode()).hexdigest()


def _character_starts(text: str, lengths: NDArray[np.int64]) -> Ids:
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if not text.isascii():
        # A byte belongs to the character of the last byte at or before it that begins one.
        begins = (np.frombuffer(text.encode(), dtype=np.uint8) & 0xC0) != 0x80
        starts = np.cumsum(begins)[starts] - 1
    return starts.astype(np.uint32)


def _read(path: Path, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "is missing" if is_missing else f"cannot be read: {error}"
        raise InputError(f"{path.name} in the folder {path.parent.name} {reason}.", hint) from error


def _parse(source: str, folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(source)
    # tokenizers raises nothing narrower: https://github.com/huggingface/tokenizers/issues/1014
    except Exception as error:
        raise InputError(
            f"tokenizer.json in the folder {folder.name} is none: {error}.",
            "Download the model again.",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(_read(path, "Download the model again."))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path.name} in the folder {folder.name} is not JSON: {error}.",
            "Download the model again.",
        ) from error
    return values if isinstance(values, dict) else {}


def _template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return _read(path, "Download the model again.")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        texts = {entry.get("name"): entry.get("template") for entry in named}
        template = texts.get("default")
    if isinstance(template, str):
        return template
    shipped = ", ".join(sorted(path.name for path in (TEMPLATES / "chat").glob("*.jinja")))
    raise InputError(
        f"The model in the folder {folder.name} has no chat template: there is neither "
        "chat_template.jinja nor a chat_template in tokenizer_config.json.",
        f"Put the template of its family there as chat_template.jinja; templates/chat has {shipped}.",
    )
