"""One conversation as the trainer reads it, token by token: made in a limited process.

`python -m studio.tokens inspect` answers one JSON object a line: {"done": Inspection} or
{"error": ...}. The page speaks to it through studio.tokens.sandbox.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from studio.domain.chat_template import Rendering
from studio.domain.conversation import RECORD_TYPES, Kind, PlainText
from studio.domain.reading import Reading, Truncation
from studio.domain.section import Section
from studio.errors import StudioError
from studio.tokens.children import error_values
from studio.tokens.counts import num_supervised
from studio.tokens.examples import Example, ExampleMaker
from studio.tokens.limits import LOAD_CPU_SECONDS, grant_cpu
from studio.tokens.spans import Span, SpanKind, parts
from studio.tokens.tokenizer import ModelTokenizer, load, tokenizer_sha256
from studio.tokens.truncate import truncate

# A page of more would not be read, and a browser would not draw it.
MAX_SHOWN_TOKENS = 20_000


class Request(Section):
    """What is to be shown.

    Attributes:
        record: Its canonical line.
        verdicts: Where it is kept whether a tokenizer has a fast path.
        cpu_seconds: Processor time for it, after the tokenizer is loaded.
    """

    record: str
    kind: Kind
    tokenizer: Path
    verdicts: Path
    reading: Reading
    truncation: Truncation
    cpu_seconds: int


class Piece(Section):
    """Tokens side by side that are alike.

    Attributes:
        kind: What they are for a reader.
        supervised: Whether they are learned.
        kept: Whether truncation leaves them.
        tokens: Their numbers.
        texts: The text of each; of several tokens that make one character, the last one has it.
    """

    kind: SpanKind
    supervised: bool
    kept: bool
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


class Shown(Section):
    """One training example, whole, with what truncation takes from it.

    Attributes:
        supervised: Tokens that count in the loss.
        trained: Examples that truncation makes of it; 0 when nothing is left.
        lost_supervised: Supervised tokens that truncation takes.
        unwritten: Replies whose thinking the template leaves out.
        num_not_shown: Tokens after the last piece, of a very long example.
    """

    pieces: tuple[Piece, ...]
    tokens: int
    supervised: int
    trained: int
    lost_tokens: int
    lost_supervised: int
    unwritten: int
    num_not_shown: int


class Inspection(Section):
    """One record as the trainer reads it; several examples where the template rewrites history."""

    examples: tuple[Shown, ...]
    is_fast: bool
    why_slow: str


def serve(stream: BinaryIO, say: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests, one a line, until the stream ends.

    Args:
        stream: Requests as JSON.
        say: Receives the answers.
    """
    for line in stream:
        try:
            inspection = inspect(Request.model_validate_json(line))
        except StudioError as error:
            say({"error": error_values(error)})
        else:
            say({"done": inspection.model_dump(mode="json")})


def inspect(request: Request) -> Inspection:
    """Return a record as the trainer reads it.

    Raises:
        InputError: The tokenizer or its template is wrong, or refuses the record.
    """
    grant_cpu(LOAD_CPU_SECONDS)
    sha = tokenizer_sha256(request.tokenizer)
    tokenizer = _loaded(request.tokenizer, request.verdicts, sha)
    grant_cpu(request.cpu_seconds)
    maker = ExampleMaker(tokenizer, request.reading)
    record = RECORD_TYPES[request.kind].from_json(request.record)
    if isinstance(record, PlainText):
        examples = maker.make(record, 0)
        renderings = maker.renderings(record)
    else:
        renderings = maker.renderings(record)
        examples = [maker.example(rendering, 0) for rendering in renderings]
    return Inspection(
        examples=tuple(
            _shown(tokenizer, rendering, example, request.truncation)
            for rendering, example in zip(renderings, examples, strict=True)
        ),
        is_fast=tokenizer.fast,
        why_slow=tokenizer.why_slow,
    )


@lru_cache(maxsize=2)
def _loaded(folder: Path, verdicts: Path, _sha256: str) -> ModelTokenizer:
    return load(folder, verdicts)


def _shown(
    tokenizer: ModelTokenizer, rendering: Rendering, example: Example, rule: Truncation
) -> Shown:
    cut = truncate(example, rule)
    return Shown(
        pieces=tuple(_pieces(tokenizer, rendering.text, example, cut.kept)),
        tokens=len(example.tokens),
        supervised=num_supervised(example.mask),
        trained=len(cut.examples),
        lost_tokens=cut.lost_tokens,
        lost_supervised=cut.lost_supervised,
        unwritten=example.unwritten,
        num_not_shown=max(0, len(example.tokens) - MAX_SHOWN_TOKENS),
    )


def _pieces(
    tokenizer: ModelTokenizer, text: str, example: Example, kept: np.ndarray
) -> list[Piece]:
    _, starts = tokenizer.encode(text)
    # The token that ends a text which is no conversation stands for no character.
    extra = [len(text)] * (len(example.tokens) - len(starts))
    bounds = [0, *starts[1:].tolist(), *extra, len(text)][-len(example.tokens) - 1 :]
    found = parts(text) or [Span(start=0, end=0, kind="text")]
    ends = np.array([span.end for span in found])
    which = np.searchsorted(ends, bounds[:-1], side="right").clip(max=len(found) - 1)
    alike = list(zip(which.tolist(), example.mask.tolist(), kept.tolist(), strict=True))
    tokens, pieces = example.tokens.tolist(), []
    shown = range(min(len(tokens), MAX_SHOWN_TOKENS))
    for (place, supervised, is_kept), run in groupby(shown, key=lambda index: alike[index]):
        indices = list(run)
        pieces.append(
            Piece(
                kind=found[place].kind,
                supervised=supervised,
                kept=is_kept,
                tokens=tuple(tokens[index] for index in indices),
                texts=tuple(text[bounds[index] : bounds[index + 1]] for index in indices),
            )
        )
    return pieces
