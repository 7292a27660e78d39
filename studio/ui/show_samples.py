"""Sample replies as HTML: how the answer to each prompt changed while the run trained."""

from collections.abc import Sequence
from html import escape

from studio.domain.sample import Sample


def samples(found: Sequence[Sample]) -> str:
    """Return the replies to each prompt, newest first; empty when there are none."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in found:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return "".join(_prompt(prompt, replies) for prompt, replies in by_prompt.items())


def _prompt(prompt: str, replies: list[Sample]) -> str:
    rows = "".join(_reply(sample) for sample in reversed(replies))
    question = f'<div class="bubble user"><b>Prompt</b><div>{escape(prompt)}</div></div>'
    label = escape(f"replies to {prompt[:60]}", quote=True)
    return (
        f'<div class="talk" tabindex="0" role="group" aria-label="{label}">{question}{rows}</div>'
    )


def _reply(sample: Sample) -> str:
    title = f"Step {sample.step:,}" if sample.step else "Before the first step"
    tail = "<small>cut at the longest sample</small>" if sample.is_cut else ""
    text = escape(sample.reply) or "<i>nothing</i>"
    return f'<div class="bubble assistant"><b>{title}</b><div>{text}</div>{tail}</div>'
