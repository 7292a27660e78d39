"""One conversation token by token: what each is, whether it is learned, what is cut."""

from html import escape

from studio.domain.reading import Truncation
from studio.tokens.sandbox import Inspection, Piece, Shown
from studio.ui.show import count, notice

KINDS = {
    "system": "system",
    "user": "user",
    "tool_result": "tool result",
    "think": "thinking",
    "answer": "answer",
    "tool_call": "tool call",
    "header": "marks of turns",
}


def inspection(found: Inspection, rule: Truncation) -> str:
    """Return every example of a record; the number of a token shows when the pointer is on it.

    Args:
        found: What the model reads.
        rule: What happens to long examples.
    """
    if not found.examples:
        return notice(
            "bad",
            "Nothing of this conversation is learned: no reply of an assistant counts.",
            "A weight of 0 on every reply does that.",
        )
    several = ""
    if len(found.examples) > 1:
        several = notice(
            "info",
            f"{len(found.examples)} examples: this model's template rewrites earlier turns, so "
            "each question is learned with the history as it will stand at inference.",
        )
    views = "".join(
        _example(number, len(found.examples), example, rule)
        for number, example in enumerate(found.examples, start=1)
    )
    return f'{_legend()}{several}<div class="tokens">{views}</div>'


def _legend() -> str:
    kinds = "".join(f'<span class="t {kind}">{words}</span>' for kind, words in KINDS.items())
    return (
        f'<div class="legend" aria-label="legend">{kinds}'
        '<span class="t answer learned">learned</span><span class="t answer cut">cut</span></div>'
    )


def _example(number: int, total: int, found: Shown, rule: Truncation) -> str:
    share = found.supervised / max(1, found.tokens)
    words = [f"{count(found.tokens)} tokens", f"{count(found.supervised)} learned ({share:.0%})"]
    # Nothing is cut when the run refuses to start.
    is_refused = bool(found.lost_tokens) and rule.policy == "refuse"
    if is_refused:
        words.append(f"longer than {count(rule.max_length_tokens or 0)}: a run refuses to start")
    elif found.lost_tokens:
        words.append(
            f"{count(found.lost_tokens)} cut, {count(found.lost_supervised)} of them learned"
        )
    if not is_refused and found.trained != 1:
        words.append(
            f"split into {found.trained} examples" if found.trained else "nothing is left to train"
        )
    if found.unwritten:
        words.append("its thinking is not written by this model's template")
    head = f"Example {number} of {total} · " if total > 1 else ""
    more = f"<p>and {count(found.num_not_shown)} more tokens</p>" if found.num_not_shown > 0 else ""
    body = "".join(_piece(piece, shows_cuts=not is_refused) for piece in found.pieces)
    return (
        f'<div class="under"><span>{head}{" · ".join(words)}</span></div>'
        f'<div class="tokenbox" tabindex="0" role="group" aria-label="tokens">{body}{more}</div>'
    )


def _piece(piece: Piece, *, shows_cuts: bool) -> str:
    classes = ["t", piece.kind]
    if piece.supervised:
        classes.append("learned")
    if shows_cuts and not piece.kept:
        classes.append("cut")
    tokens = "".join(
        f'<i data-id="{token}">{_text(text)}</i>'
        for token, text in zip(piece.tokens, piece.texts, strict=True)
    )
    return f'<span class="{" ".join(classes)}">{tokens}</span>'


def _text(text: str) -> str:
    """Return a token's text with its line feeds seen."""
    if not text:
        return '<u class="none">·</u>'
    return escape(text).replace("\n", "<u>↵</u>\n")
