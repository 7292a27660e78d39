"""The record shape: every accepted form of the same content becomes the same bytes."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.conversation import Conversation, Image, Message, ToolCall
from studio.domain.openai_messages import from_openai, split_thinking
from studio.domain.strict_json import MAX_DEPTH, MAX_DIGITS, RecordError, json_sentence, parse_json

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Beyond 64 bits and beyond exact floats, where parsers differ.
    | st.sampled_from([2**63, -(2**200), 5e-324, 1.7976931348623157e308, 0.1, -0.0])
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON_VALUES, max_size=3)
CALLS = st.builds(ToolCall, id=st.none() | st.text(), name=st.text(min_size=1), arguments=OBJECTS)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    content=st.text(),
    reasoning_content=st.none() | st.text(),
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    tool_call_id=st.none() | st.text(),
    name=st.none() | st.text(),
)
CONVERSATIONS = st.builds(
    Conversation,
    messages=st.lists(MESSAGES, min_size=1, max_size=4).map(tuple),
    tools=st.lists(OBJECTS, max_size=2).map(tuple),
)


def as_openai(conversation: Conversation, seed: int, arguments_as_text: bool) -> dict[str, Any]:
    """Write a Conversation as OpenAI's API does, its fields in an order drawn from `seed`."""
    shuffle = random.Random(seed)

    def mixed(values: dict[str, Any]) -> dict[str, Any]:
        return dict(shuffle.sample(list(values.items()), len(values)))

    def call(value: ToolCall) -> dict[str, Any]:
        arguments: Any = json.dumps(value.arguments) if arguments_as_text else value.arguments
        function = mixed({"name": value.name, "arguments": arguments})
        return mixed({"id": value.id, "type": "function", "function": function})

    messages = [
        mixed(
            {
                "role": message.role,
                "content": message.content,
                "reasoning_content": message.reasoning_content,
                "tool_calls": [call(value) for value in message.tool_calls] or None,
                "tool_call_id": message.tool_call_id,
                "name": message.name,
            }
        )
        for message in conversation.messages
    ]
    return mixed({"messages": messages, "tools": list(conversation.tools) or None, "id": "chat-1"})


@given(CONVERSATIONS)
def test_a_canonical_line_reads_back_as_the_same_conversation(conversation: Conversation) -> None:
    line = conversation.to_json()

    assert Conversation.from_json(line) == conversation
    assert Conversation.from_json(line).to_json() == line
    assert "\n" not in line
    assert "\r" not in line


@given(CONVERSATIONS, st.integers(), st.booleans())
def test_order_of_fields_and_form_of_arguments_do_not_change_the_bytes(
    conversation: Conversation, seed: int, arguments_as_text: bool
) -> None:
    record = as_openai(conversation, seed, arguments_as_text)

    assert from_openai(record).to_json() == conversation.to_json()


def test_text_parts_and_plain_text_give_the_same_bytes() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]

    assert from_openai(one("user", parts)).to_json() == from_openai(one("user", "Hello")).to_json()


def test_order_inside_arguments_is_kept_because_the_chat_template_writes_it() -> None:
    call = {"function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}
    conversation = from_openai({"messages": [{"role": "assistant", "tool_calls": [call]}]})

    assert list(conversation.messages[0].tool_calls[0].arguments) == ["b", "a"]
    assert '{"b":1,"a":2}' in conversation.to_json()


def test_missing_or_empty_arguments_are_an_empty_object() -> None:
    for function in ({"name": "f"}, {"name": "f", "arguments": ""}, {"name": "f", "arguments": {}}):
        record = {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}
        assert from_openai(record).messages[0].tool_calls[0].arguments == {}


def test_templates_see_system_for_developer_and_nothing_that_they_do_not_read() -> None:
    conversation = Conversation(
        messages=(
            Message(role="developer", content="Be brief."),
            Message(role="user", content="Tide?", name="Ann"),
            Message(
                role="assistant",
                reasoning_content="Look it up.",
                tool_calls=(ToolCall(id="call_1", name="get_tide", arguments={"at": "Heron"}),),
            ),
            Message(role="tool", content="17:50", tool_call_id="call_1"),
        )
    )

    assert conversation.template_messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tide?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Look it up.",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get_tide", "arguments": {"at": "Heron"}},
                }
            ],
        },
        {"role": "tool", "content": "17:50"},
    ]


def one(role: str, content: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def with_call(call: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("record", "path", "reason"),
    [
        ("text", "", "a conversation is an object with a list `messages`"),
        ([], "", "a conversation is an object with a list `messages`"),
        ({"prompt": "a"}, "messages", "the list `messages` is missing"),
        ({"messages": "a"}, "messages", "a list is expected"),
        ({"messages": []}, "messages", "at least one entry is expected"),
        ({"messages": ["a"]}, "messages[0]", "an object is expected"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "this field is missing"),
        (
            one("bot", "a"),
            "messages[0].role",
            "input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
        (one("user", 5), "messages[0].content", "text or a list of parts is expected"),
        (
            one("user", None),
            "messages[0]",
            "content is missing; only an assistant that calls tools may omit it",
        ),
        (
            one("user", [{"type": "image_url", "image_url": {"url": 5}}]),
            "messages[0].content",
            "part 0 is an image without a reference",
        ),
        (
            one("user", [{"type": "video", "video": "a"}]),
            "messages[0].content",
            "part 0 is of type 'video'; text and images are known",
        ),
        (
            one("user", ["a"]),
            "messages[0].content",
            "part 0 is of type 'str'; text and images are known",
        ),
        (
            one("system", [{"type": "image_url", "image_url": "a"}]),
            "messages[0]",
            "a system message cannot hold images",
        ),
        (one("user", [{"type": "text"}]), "messages[0].content", "part 0 has no text"),
        ({**one("user", "a"), "tools": {}}, "tools", "a list is expected"),
        ({**one("user", "a"), "tools": ["f"]}, "tools[0]", "an object is expected"),
        (
            with_call({"function": {"name": ""}}),
            "messages[0].tool_calls[0].function.name",
            "it must not be empty",
        ),
        (
            with_call({"index": 0, "function": {"name": "f"}}),
            "messages[0].tool_calls[0].index",
            "a field of this name is not known here",
        ),
        (
            with_call({"function": {"name": "f", "arguments": "{'a': 1}"}}),
            ARGUMENTS,
            "the arguments are not JSON: expecting property name enclosed in double quotes "
            "at column 2",
        ),
        (
            with_call({"function": {"name": "f", "arguments": "[1]"}}),
            ARGUMENTS,
            "the arguments are JSON, but not an object",
        ),
        (
            with_call({"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}),
            ARGUMENTS,
            "in the arguments, a: the key stands twice in one object",
        ),
        (
            with_call({"function": {"name": "f", "arguments": '{"a": 1e999}'}}),
            ARGUMENTS,
            "in the arguments, the number is too large",
        ),
        # Each of these would change what is trained if it were silently dropped.
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "messages[0].weight",
            "a weight is 0 (not trained) or 1 (trained)",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0}]},
            "messages[0]",
            "only an assistant's message has a weight; the others never train",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
            "this is an older form; write it as tool_calls",
        ),
    ],
)
def test_a_wrong_record_names_the_place_and_what_is_expected(
    record: object, path: str, reason: str
) -> None:
    with pytest.raises(RecordError) as caught:
        from_openai(record)

    assert (caught.value.path, caught.value.reason) == (path, reason)


def test_a_weight_of_one_and_an_empty_function_call_mean_nothing() -> None:
    message = {"role": "assistant", "content": "a", "weight": 1, "function_call": None}

    assert from_openai({"messages": [message]}) == from_openai(one("assistant", "a"))


def test_a_weight_of_zero_is_kept() -> None:
    message = {"role": "assistant", "content": "a", "weight": 0}
    conversation = from_openai({"messages": [message]})

    assert conversation.messages[0].weight == 0
    assert Conversation.from_json(conversation.to_json()) == conversation


# ---- thinking in tags -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        ("<think>\n\na\nb\n</think>\n\nc\n", "a\nb", "c\n"),
        (" \n<think>a</think>", "a", ""),
        ("<think></think>b", "", "b"),
        ("<think>\n\n</think>\n\nb", "", "b"),
        ("b", None, "b"),
        ("b <think>a</think>", None, "b <think>a</think>"),
        ("<think>a", None, "<think>a"),
        ("a</think>b", None, "a</think>b"),
        ("<think>a<think>b</think>c", None, "<think>a<think>b</think>c"),
        ("<think>a</think>b</think>c", None, "<think>a</think>b</think>c"),
    ],
)
def test_thinking_in_tags_before_an_answer_becomes_reasoning(
    text: str, reasoning: str | None, answer: str
) -> None:
    assert split_thinking(text) == (reasoning, answer)
    message = from_openai(one("assistant", text)).messages[0]
    assert (message.reasoning_content, message.content) == (reasoning, answer)


def test_tags_stay_where_others_speak_or_thinking_has_its_field() -> None:
    text = "<think>a</think>b"
    given_thinking = {"role": "assistant", "content": text, "reasoning_content": "c"}
    message = from_openai({"messages": [given_thinking]}).messages[0]

    assert from_openai(one("user", text)).messages[0].content == text
    assert (message.reasoning_content, message.content) == ("c", text)


# ---- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
    ],
)
def test_an_image_is_kept_by_reference_at_its_place(part: dict[str, Any]) -> None:
    text = [{"type": "text", "text": "Here:"}, {"type": "text", "text": "?"}]
    conversation = from_openai(one("user", [text[0], part, text[1]]))
    message = conversation.messages[0]

    assert (message.content, message.images) == ("Here:?", (Image(at=5, ref="a.png"),))
    assert message.template_content() == [text[0], {"type": "image", "image": "a.png"}, text[1]]
    assert Conversation.from_json(conversation.to_json()) == conversation


PIECES = st.lists(
    st.text(min_size=1).map(lambda text: {"type": "text", "text": text})
    | st.text(min_size=1).map(lambda ref: {"type": "image", "image": ref}),
    max_size=6,
)


@given(PIECES)
def test_templates_see_text_and_images_in_their_order(parts: list[dict[str, str]]) -> None:
    message = from_openai(one("user", parts)).messages[0]
    seen = message.template_content()
    again = from_openai(one("user", seen)).messages[0]

    assert again == message
    assert isinstance(seen, list) == any(part["type"] == "image" for part in parts)


@given(JSON_VALUES)
def test_strict_parsing_agrees_with_the_standard_library_on_good_json(value: Any) -> None:
    assert repr(parse_json(json.dumps(value))) == repr(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "not JSON: NaN is not a JSON number"),
        ("-Infinity", "not JSON: -Infinity is not a JSON number"),
        ("1e999", "the number is too large"),
        ("9" * 5000, f"a number has 5000 digits; at most {MAX_DIGITS} are read"),
        ("[" * 100_000, f"the record is nested more than {MAX_DEPTH} levels deep"),
        (
            "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
            f"the record is nested more than {MAX_DEPTH} levels deep",
        ),
        ('{"a": 1, "a": 1}', "the key stands twice in one object"),
    ],
)
def test_strict_parsing_refuses_what_a_canonical_line_cannot_hold(text: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_json(text)

    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": "b', "not JSON: unterminated string starting at column 7"),
        ('{"a": 1', "not JSON: expecting ',' delimiter at column 8"),
        ("{} {}", "not JSON: extra data at column 4"),
        ('"\x01"', "not JSON: invalid control character at column 2"),
    ],
)
def test_a_syntax_error_is_one_sentence_with_the_column(text: str, sentence: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        parse_json(text)

    assert json_sentence(caught.value) == sentence


def test_the_deepest_accepted_values_can_be_stored_and_read_back() -> None:
    deep: Any = "bottom"
    for _ in range(MAX_DEPTH - 3):  # below the record, its list of tools and one tool
        deep = [deep]
    record = {**one("user", "a"), "tools": [{"x": deep}]}
    call = with_call({"function": {"name": "f", "arguments": json.dumps({"x": deep})}})

    for parsed in (from_openai(parse_json(json.dumps(value))) for value in (record, call)):
        assert Conversation.from_json(parsed.to_json()) == parsed
    with pytest.raises(RecordError):
        parse_json(json.dumps({**one("user", "a"), "tools": [{"x": [deep]}]}))


def test_the_longest_accepted_integer_can_be_stored_and_read_back() -> None:
    record = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{{"x": {"9" * MAX_DIGITS}}}]}}'
    conversation = from_openai(parse_json(record))

    assert Conversation.from_json(conversation.to_json()) == conversation
