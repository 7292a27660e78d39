"""The page edge: errors are sentences, faults are logged, and nothing is shown of their insides."""

import inspect
import logging
from collections.abc import Iterator

import gradio as gr
import pytest

from studio.errors import ConflictError, StudioError
from studio.ui.edge import shown

SECRET = "password in /etc/secret"


def refuse(name: str) -> str:
    """Refuse in words."""
    raise ConflictError(f"Run {name} is over.", "Launch it again.")


def break_down(name: str) -> str:  # noqa: ARG001
    raise KeyError(SECRET)


def refuse_later(name: str) -> Iterator[str]:
    yield name
    raise ConflictError(f"Run {name} is over.", "Launch it again.")


def break_down_later(name: str) -> Iterator[str]:
    yield name
    raise KeyError(SECRET)


def test_what_works_is_passed_on() -> None:
    assert shown(lambda a, b: a + b)(1, b=2) == 3


def test_a_generator_stays_a_generator() -> None:
    def count(to: int) -> Iterator[int]:
        yield from range(to)

    wrapped = shown(count)
    assert inspect.isgeneratorfunction(wrapped)
    assert list(wrapped(3)) == [0, 1, 2]


def test_name_and_signature_of_a_handler_are_kept_for_gradio() -> None:
    wrapped = shown(refuse)
    assert wrapped.__name__ == "refuse"
    assert list(inspect.signature(wrapped).parameters) == ["name"]


def test_an_expected_error_shows_its_message_and_its_hint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(gr.Error) as caught:
        shown(refuse)("7")
    assert caught.value.message == "Run 7 is over. Launch it again."
    assert isinstance(caught.value.__cause__, StudioError)
    assert caplog.records == []


def test_a_fault_is_logged_with_its_traceback_and_shown_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as caught:
        shown(break_down)("7")
    shown_text = f"{caught.value.title} {caught.value.message}"
    assert "A fault of the studio KeyError." in shown_text
    assert "Traceback" not in shown_text
    assert SECRET not in shown_text
    (record,) = caplog.records
    assert record.exc_info is not None
    assert SECRET in caplog.text


def test_generators_show_their_errors_in_the_same_way(caplog: pytest.LogCaptureFixture) -> None:
    steps = shown(refuse_later)("7")
    assert next(steps) == "7"
    with pytest.raises(gr.Error, match=r"Run 7 is over\. Launch it again\."):
        next(steps)
    steps = shown(break_down_later)("7")
    assert next(steps) == "7"
    with pytest.raises(gr.Error) as caught:
        next(steps)
    assert SECRET not in caught.value.message
    assert SECRET in caplog.text


def test_an_error_that_is_for_the_page_already_is_left_as_it_is() -> None:
    error = gr.Error("as it is")

    def handler() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        shown(handler)()
    assert caught.value is error


def test_what_a_message_quotes_is_text_and_no_html() -> None:
    with pytest.raises(gr.Error) as caught:
        shown(refuse)("<img src=x onerror=alert(1)>")
    assert "<" not in caught.value.message
    assert "&lt;img src=x" in caught.value.message
