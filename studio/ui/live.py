"""What a timer sends to a page: only what differs from what that page shows."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

# Gradio would refuse a choice that was taken from the list while it was on its way, in words about
# Python types; as it is, it reaches a verb, which says what is not there any more.
RAW = False
# What a component's value depends on, and how to make it.
Part = tuple[Any, Callable[[], Any]]


def plain(value: Any) -> Part:
    """Return the part of a component whose value is at hand."""
    return value, lambda: value


def changed(parts: Sequence[Part], before: dict[str, Any]) -> list[Any]:
    """Return what the browser shows from now on, then the parts that differ from it.

    Nothing flickers, and what somebody has folded or chosen meanwhile stays as it is.

    Args:
        parts: One for each output.
        before: What the browser shows.
    """
    now = {str(index): repr(depends) for index, (depends, _) in enumerate(parts)}
    if now == before:
        return [gr.skip()] * (len(parts) + 1)
    updates = [
        gr.skip() if before.get(str(index)) == now[str(index)] else make()
        for index, (_, make) in enumerate(parts)
    ]
    return [now, *updates]
