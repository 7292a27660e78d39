"""Records as others write them: what is written out is read as the same record."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.conversation import (
    Conversation,
    Image,
    Kind,
    Message,
    PlainText,
    Preference,
    Role,
    ToolCall,
)
from studio.domain.strict_json import RecordError
from studio.intake.openai import from_text, to_line, to_text

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ANSWER = Message(role="assistant", content="Yes.")


@st.composite
def messages(draw: st.DrawFn) -> Message:
    roles: tuple[Role, ...] = ("user", "assistant", "tool")
    role = draw(st.sampled_from(roles))
    content = draw(TEXT)
    if role != "assistant":
        places = draw(st.lists(st.integers(0, len(content)), max_size=2 if role == "user" else 0))
        images = tuple(Image(at=at, ref="a.png") for at in sorted(places))
        return Message(role=role, content=content, images=images, name=draw(st.none() | TEXT))
    arguments = st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(TEXT), max_size=2)
    names = st.text("abc", min_size=1, max_size=3)
    calls = st.builds(ToolCall, id=st.none() | TEXT, name=names, arguments=arguments)
    return Message(
        role="assistant",
        content=content,
        reasoning_content=draw(TEXT),
        tool_calls=tuple(draw(st.lists(calls, max_size=2))),
        weight=0 if draw(st.booleans()) else 1,
    )


@given(st.lists(messages(), min_size=1, max_size=4))
def test_a_conversation_is_read_as_it_was_written(turns: list[Message]) -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    record = Conversation(messages=tuple(turns), tools=tools)
    assert from_text(to_text(record), Kind.CONVERSATIONS) == record
    assert from_text(to_line(record).decode(), Kind.CONVERSATIONS) == record


@given(TEXT.filter(str.strip), TEXT.filter(str.strip))
def test_preferences_and_texts_are_read_as_they_were_written(one: str, other: str) -> None:
    pair = Preference(
        messages=(Message(role="user", content=one),),
        chosen=(ANSWER, Message(role="user", content=other), ANSWER),
        rejected=(Message(role="assistant", content=other, reasoning_content=""),),
    )
    assert from_text(to_text(pair), Kind.PREFERENCES) == pair
    assert from_text(to_text(PlainText(text=one)), Kind.TEXTS) == PlainText(text=one)


def test_tool_calls_are_written_as_openai_has_them() -> None:
    call = ToolCall(id="call_1", name="get_tide", arguments={"at": "Rye"})
    record = Conversation(messages=(Message(role="assistant", tool_calls=(call,)),))
    assert json.loads(to_line(record))["messages"] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_tide", "arguments": '{"at": "Rye"}'},
                }
            ],
        }
    ]


def test_what_is_not_json_is_named_by_its_line() -> None:
    with pytest.raises(RecordError, match=r"line 2 is not JSON: .* at column 3"):
        from_text("{\n  messages}", Kind.CONVERSATIONS)
