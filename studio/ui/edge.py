"""The page edge: what goes wrong in a handler becomes a sentence on the page."""

import functools
import inspect
import logging
from collections.abc import Callable
from html import escape
from typing import Any, TypeVar

import gradio as gr

from studio.errors import StudioError

logger = logging.getLogger(__name__)

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


def shown(handler: _Handler) -> _Handler:
    """Wrap a handler, plain or generator, so that its errors are shown in words.

    An expected error shows its message and hint. Anything else is logged with its traceback and
    shown as a fault of the studio.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise _in_words(error) from error

        return generator  # type: ignore[return-value]

    @functools.wraps(handler)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise _in_words(error) from error

    return plain  # type: ignore[return-value]


def _in_words(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, StudioError):
        # The toast shows HTML, and a message quotes what someone wrote.
        text = escape(str(error), quote=False)
        return gr.Error(text, title="That did not work", print_exception=False, duration=12)
    logger.error("a handler of the page failed", exc_info=error)
    text = f"{type(error).__name__}. Nothing was changed; the terminal of the studio has more."
    return gr.Error(text, title="A fault of the studio", print_exception=False, duration=12)
