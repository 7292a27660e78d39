"""Formats are recognised by their fields; converted, the same content is the same record."""

import json
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from pydantic import ValidationError

from studio.domain.conversation import (
    Conversation,
    Image,
    Kind,
    Message,
    PlainText,
    Preference,
    ToolCall,
)
from studio.domain.openai_messages import from_openai
from studio.domain.strict_json import RecordError
from studio.intake.convert import convert
from studio.intake.formats import (
    KNOWN_FIELDS,
    Format,
    Mapping,
    UnknownFormatError,
    format_of,
    guess_mapping,
    recognise,
)

USER = Message(role="user", content="Why?")
ANSWER = Message(role="assistant", content="So.")
SYSTEM = Message(role="system", content="Be brief.")
THINKING = Message(role="assistant", content="So.", reasoning_content="Hm.")
BAD = Message(role="assistant", content="No.")
ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "So."}
REFUSED = {"role": "assistant", "content": "No."}
TOOL = {"name": "get", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}
HUMAN = {"from": "human", "value": "Why?"}
GPT = {"from": "gpt", "value": "So."}


def conversation(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(messages=messages, tools=tools)


PLAIN = conversation(USER, ANSWER)
WITH_SYSTEM = conversation(SYSTEM, USER, ANSWER)
PAIR = Preference(messages=(USER,), chosen=(ANSWER,), rejected=(BAD,))
CALLING = conversation(
    USER,
    Message(role="assistant", tool_calls=(ToolCall(name="get", arguments={"a": 1}),)),
    Message(role="tool", content="7"),
    ANSWER,
    tools=(WRAPPED,),
)
CALL = {"name": "get", "arguments": {"a": 1}}
SHAREGPT_CALL = [
    HUMAN,
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "7"},
    GPT,
]

GOOD: dict[str, tuple[Format, dict[str, Any], Any]] = {
    # ---- OpenAI ----
    "openai": (Format.OPENAI, {"messages": [ASKED, ANSWERED]}, PLAIN),
    "openai as text": (Format.OPENAI, {"messages": json.dumps([ASKED, ANSWERED])}, PLAIN),
    "openai, tools as text": (
        Format.OPENAI,
        {"messages": [ASKED, ANSWERED], "tools": json.dumps([WRAPPED])},
        conversation(USER, ANSWER, tools=(WRAPPED,)),
    ),
    "openai, no tools as text": (
        Format.OPENAI,
        {"messages": [ASKED, ANSWERED], "tools": "", "prompt": "x", "text": "y"},
        PLAIN,
    ),
    "openai, calls without a function": (
        Format.OPENAI,
        {
            "messages": [
                ASKED,
                {"role": "assistant", "tool_calls": [{**CALL, "id": "1"}]},
            ]
        },
        conversation(
            USER,
            Message(
                role="assistant", tool_calls=(ToolCall(id="1", name="get", arguments={"a": 1}),)
            ),
        ),
    ),
    # ---- ShareGPT ----
    "sharegpt": (Format.SHAREGPT, {"conversations": [HUMAN, GPT]}, PLAIN),
    "sharegpt as text": (Format.SHAREGPT, {"conversations": json.dumps([HUMAN, GPT])}, PLAIN),
    "sharegpt, singular": (Format.SHAREGPT, {"conversation": [HUMAN, GPT]}, PLAIN),
    "sharegpt, system beside": (
        Format.SHAREGPT,
        {"conversations": [HUMAN, GPT], "system": "Be brief."},
        WITH_SYSTEM,
    ),
    "sharegpt, system inside": (
        Format.SHAREGPT,
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT], "system": " "},
        WITH_SYSTEM,
    ),
    "sharegpt, openai's names": (Format.SHAREGPT, {"conversations": [ASKED, ANSWERED]}, PLAIN),
    "sharegpt, mixed names": (
        Format.SHAREGPT,
        {"conversations": [{"role": "human", "content": "Why?"}, {**ANSWERED, "role": "gpt"}]},
        PLAIN,
    ),
    "sharegpt, thinking": (
        Format.SHAREGPT,
        {"conversations": [HUMAN, {"from": "gpt", "value": "<think>\nHm.\n</think>\n\nSo."}]},
        conversation(USER, THINKING),
    ),
    "sharegpt, weight": (
        Format.SHAREGPT,
        {"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, {**GPT, "weight": 1.0}]},
        conversation(USER, Message(role="assistant", content="So.", weight=0), USER, ANSWER),
    ),
    "sharegpt, calls": (
        Format.SHAREGPT,
        {"conversations": SHAREGPT_CALL, "tools": json.dumps([TOOL])},
        CALLING,
    ),
    "sharegpt, wrapped tools as texts": (
        Format.SHAREGPT,
        {"conversations": SHAREGPT_CALL, "tools": [json.dumps(WRAPPED)]},
        CALLING,
    ),
    "sharegpt, several calls with thinking": (
        Format.SHAREGPT,
        {
            "conversations": [
                HUMAN,
                {
                    "from": "function_call",
                    "value": "<think>Hm.</think>"
                    + json.dumps([{"name": "a"}, {"name": "b", "arguments": '{"c": 1}'}]),
                },
            ],
            "tools": "[]",
        },
        conversation(
            USER,
            Message(
                role="assistant",
                reasoning_content="Hm.",
                tool_calls=(
                    ToolCall(name="a", arguments={}),
                    ToolCall(name="b", arguments={"c": 1}),
                ),
            ),
        ),
    ),
    "sharegpt, pictures": (
        Format.SHAREGPT,
        {
            "conversations": [{"from": "human", "value": "<image>Is<image>it?"}, GPT],
            "images": ["a.png", {"path": "b.png", "bytes": None}],
        },
        conversation(
            Message(
                role="user",
                content="Isit?",
                images=(Image(at=0, ref="a.png"), Image(at=2, ref="b.png")),
            ),
            ANSWER,
        ),
    ),
    # ---- Alpaca ----
    "alpaca": (Format.ALPACA, {"instruction": "Why?", "input": "", "output": "So."}, PLAIN),
    "alpaca, rendered text": (
        Format.ALPACA,
        {"instruction": "Why?", "input": None, "output": "So.", "text": "Below is"},
        PLAIN,
    ),
    "alpaca, input": (
        Format.ALPACA,
        {"instruction": "Add.", "input": "1, 2", "output": "So."},
        conversation(Message(role="user", content="Add.\n1, 2"), ANSWER),
    ),
    "alpaca, only input": (
        Format.ALPACA,
        {"instruction": "", "input": "Why?", "output": "So."},
        PLAIN,
    ),
    "alpaca, system and history": (
        Format.ALPACA,
        {
            "instruction": "Why?",
            "output": "So.",
            "system": "Be brief.",
            "history": [["Why?", "So."]],
        },
        conversation(SYSTEM, USER, ANSWER, USER, ANSWER),
    ),
    "dolly": (
        Format.ALPACA,
        {"instruction": "Why?", "context": "", "response": "So.", "category": "qa"},
        PLAIN,
    ),
    "alpaca, thinking": (
        Format.ALPACA,
        {"instruction": "Why?", "output": "So.", "reasoning": "Hm."},
        conversation(USER, THINKING),
    ),
    # ---- prompt and completion ----
    "prompt": (Format.PROMPT_COMPLETION, {"prompt": "Why?", "completion": "So."}, PLAIN),
    "prompt before text": (
        Format.PROMPT_COMPLETION,
        {"prompt": "Why?", "completion": "So.", "text": "Why? So.", "label": 1},
        PLAIN,
    ),
    "question": (Format.PROMPT_COMPLETION, {"question": "Why?", "answer": "So."}, PLAIN),
    "input and target": (Format.PROMPT_COMPLETION, {"input": "Why?", "target": "So."}, PLAIN),
    "question with context": (
        Format.PROMPT_COMPLETION,
        {"question": "Why?", "context": "It is.", "answer": "So."},
        conversation(Message(role="user", content="Why?\nIt is."), ANSWER),
    ),
    "prompt, thinking and system": (
        Format.PROMPT_COMPLETION,
        {"system_prompt": "Be brief.", "problem": "Why?", "thinking": "Hm.", "solution": "So."},
        conversation(SYSTEM, USER, THINKING),
    ),
    "prompt of messages": (
        Format.PROMPT_COMPLETION,
        {"prompt": [ASKED], "completion": [ANSWERED], "tools": [TOOL]},
        conversation(USER, ANSWER, tools=(WRAPPED,)),
    ),
    "completion of one message": (
        Format.PROMPT_COMPLETION,
        {"prompt": "Why?", "completion": ANSWERED},
        PLAIN,
    ),
    # ---- preferences ----
    "preference": (Format.PREFERENCE, {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, PAIR),
    "preference, message lists": (
        Format.PREFERENCE,
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [REFUSED]},
        PAIR,
    ),
    "preference, single messages": (
        Format.PREFERENCE,
        {"prompt": "Why?", "chosen": ANSWERED, "rejected": REFUSED, "text": "x", "messages": None},
        PAIR,
    ),
    "preference, implicit prompt": (
        Format.PREFERENCE,
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, REFUSED]},
        PAIR,
    ),
    "preference, ultrafeedback": (
        Format.PREFERENCE,
        {
            "prompt": "Why?",
            "messages": [ASKED, ANSWERED],
            "chosen": [ASKED, ANSWERED],
            "rejected": [ASKED, REFUSED],
        },
        PAIR,
    ),
    "preference, messages as prompt": (
        Format.PREFERENCE,
        {"messages": [ASKED], "chosen": [ANSWERED], "rejected": [REFUSED]},
        PAIR,
    ),
    "preference, system and tools": (
        Format.PREFERENCE,
        {
            "prompt": "Why?",
            "chosen": "So.",
            "rejected": "No.",
            "system": "Be brief.",
            "tools": [TOOL],
        },
        Preference(messages=(SYSTEM, USER), chosen=(ANSWER,), rejected=(BAD,), tools=(WRAPPED,)),
    ),
    "preference, transcripts": (
        Format.PREFERENCE,
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
        PAIR,
    ),
    "preference, prompt as transcript": (
        Format.PREFERENCE,
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "So.", "rejected": "No."},
        PAIR,
    ),
    "preference, prompt as a question of a transcript": (
        Format.PREFERENCE,
        {"prompt": "Human: Why?", "chosen": "So.", "rejected": "No."},
        PAIR,
    ),
    "preference, openai": (
        Format.PREFERENCE,
        {
            "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWERED],
            "non_preferred_output": [REFUSED],
        },
        PAIR,
    ),
    "preference, openai as text": (
        Format.PREFERENCE,
        {
            "input": json.dumps([ASKED]),
            "preferred_output": json.dumps([ANSWERED]),
            "non_preferred_output": [REFUSED],
        },
        PAIR,
    ),
    # ---- texts ----
    "text": (Format.TEXT, {"text": "Once.", "source": "x"}, PlainText(text="Once.")),
    "text with a label": (Format.TEXT, {"text": "Once.", "label": True}, PlainText(text="Once.")),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_record_is_recognised_and_converted(name: str) -> None:
    form, value, record = GOOD[name]
    assert recognise([value]) is form
    assert convert(value, form) == record
    read = {key for key in value if key in form.fields}
    assert read <= KNOWN_FIELDS
    # What is left out changes nothing.
    assert convert({key: value[key] for key in read}, form) == record


OPENAI_WITH_PICTURES = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}
    ],
    "images": ["a.png"],
}
PICTURED = Message(role="user", content="Is it?", images=(Image(at=0, ref="a.png"),))


def test_pictures_beside_openai_messages_are_put_into_them() -> None:
    assert convert(OPENAI_WITH_PICTURES, Format.OPENAI) == conversation(PICTURED)
    marked = {
        "messages": [{"role": "user", "content": "<image>Is it?"}, ANSWERED],
        "image": "a.png",
    }
    assert convert(marked, Format.OPENAI) == conversation(PICTURED, ANSWER)
    assert convert({"messages": [ASKED], "images": []}, Format.OPENAI) == conversation(USER)


def error_of(form: Format, value: Any, mapping: Mapping | None = None) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        convert(value, form, mapping)
    json.dumps(caught.value.value)
    return caught.value.path, caught.value.reason


TEXT, FIELD, LIST, OBJECT = (
    "text is expected",
    "this field is missing",
    "a list is expected",
    "an object is expected",
)


def pair(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "chosen": "So.", "rejected": "No.", **fields}


def openai_pair(**fields: Any) -> dict[str, Any]:
    outputs = {"preferred_output": [ANSWERED], "non_preferred_output": [REFUSED]}
    return {"input": {"messages": [ASKED]}, **outputs, **fields}


def turns(*values: Any, **fields: Any) -> dict[str, Any]:
    return {"conversations": list(values), **fields}


WRONG: dict[str, tuple[Format, Any, str, str]] = {
    "no object": (Format.TEXT, [1], "", "a record is an object with named fields"),
    "another format": (
        Format.SHAREGPT,
        {"messages": []},
        "",
        "the record is in another format (OpenAI messages) than the file (ShareGPT); "
        "put it into a file of its own",
    ),
    # ---- OpenAI ----
    "openai, no messages": (Format.OPENAI, {}, "messages", "the list `messages` is missing"),
    "openai, null": (Format.OPENAI, {"messages": None}, "messages", LIST),
    "openai, text": (Format.OPENAI, {"messages": "no"}, "messages", LIST),
    "openai, text that begins as a list": (
        Format.OPENAI,
        {"messages": "[no"},
        "messages",
        "the text is not JSON: expecting value at column 2",
    ),
    "openai, tools as text": (Format.OPENAI, {"messages": [], "tools": "no"}, "tools", LIST),
    "openai, key twice in text": (
        Format.OPENAI,
        {"messages": '[{"a":1,"a":2}]'},
        "messages.a",
        "the key stands twice in one object",
    ),
    "openai, a call of numbers": (
        Format.OPENAI,
        {"messages": [{**ANSWERED, "tool_calls": [1]}]},
        "messages[0].tool_calls[0]",
        OBJECT,
    ),
    "openai, call without a name": (
        Format.OPENAI,
        {"messages": [{**ANSWERED, "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0].function",
        FIELD,
    ),
    "openai, role": (
        Format.OPENAI,
        {"messages": [{**ASKED, "role": "bot"}]},
        "messages[0].role",
        "input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    # ---- ShareGPT ----
    "sharegpt, nothing": (Format.SHAREGPT, {}, "conversations", FIELD),
    "sharegpt, number": (Format.SHAREGPT, {"conversations": 1}, "conversations", LIST),
    "sharegpt, empty": (
        Format.SHAREGPT,
        turns(),
        "conversations",
        "at least one entry is expected",
    ),
    "sharegpt, unknown sender": (
        Format.SHAREGPT,
        turns(HUMAN, GPT, {"from": "alien", "value": "x"}),
        "conversations[2].from",
        "nobody of this name is known; known: system, human, user, gpt, chatgpt, assistant, model, "
        "tool, observation, function_response, function_call, tool_call",
    ),
    "sharegpt, value": (
        Format.SHAREGPT,
        turns(HUMAN, {"from": "gpt", "value": 7}),
        "conversations[1].value",
        TEXT,
    ),
    "sharegpt, sender": (
        Format.SHAREGPT,
        turns(HUMAN, {"from": 7, "value": "x"}),
        "conversations[1].from",
        TEXT,
    ),
    "sharegpt, no value": (
        Format.SHAREGPT,
        turns({"from": "gpt"}),
        "conversations[0].value",
        FIELD,
    ),
    "sharegpt, a text among turns": (
        Format.SHAREGPT,
        turns(HUMAN, "x"),
        "conversations[1]",
        "an object with `from` and `value` is expected",
    ),
    "sharegpt, texts": (Format.SHAREGPT, turns("x"), "conversations[0]", OBJECT),
    "sharegpt, role missing": (
        Format.SHAREGPT,
        turns({"content": "x"}),
        "conversations[0].role",
        FIELD,
    ),
    "sharegpt, two systems": (
        Format.SHAREGPT,
        turns({"from": "system", "value": "x"}, HUMAN, GPT, system="y"),
        "system",
        "a system message stands here and in the list, too",
    ),
    "sharegpt, weight": (
        Format.SHAREGPT,
        turns(HUMAN, {**GPT, "weight": 0.5}),
        "conversations[1].weight",
        "a weight is 0 (not trained) or 1 (trained)",
    ),
    "sharegpt, weight of a question": (
        Format.SHAREGPT,
        turns({**HUMAN, "weight": 0}),
        "conversations[0].weight",
        "only an assistant's message has a weight; the others never train",
    ),
    "sharegpt, call is no JSON": (
        Format.SHAREGPT,
        turns(HUMAN, {"from": "function_call", "value": "get()"}),
        "conversations[1].value",
        "the text is not JSON: expecting value at column 1",
    ),
    "sharegpt, no calls": (
        Format.SHAREGPT,
        turns({"from": "function_call", "value": "[]"}),
        "conversations[0].value",
        "a call is expected",
    ),
    "sharegpt, call is a number": (
        Format.SHAREGPT,
        turns({"from": "function_call", "value": "7"}),
        "conversations[0].value",
        "a call is an object with `name` and `arguments`",
    ),
    "sharegpt, call without a name": (
        Format.SHAREGPT,
        turns({"from": "function_call", "value": "{}"}),
        "conversations[0].value.name",
        "the name of a function is expected",
    ),
    "sharegpt, arguments": (
        Format.SHAREGPT,
        turns({"from": "function_call", "value": '{"name": "a", "arguments": [1]}'}),
        "conversations[0].value.arguments",
        OBJECT,
    ),
    "sharegpt, tools": (Format.SHAREGPT, turns(HUMAN, tools=[7]), "tools[0]", OBJECT),
    "sharegpt, tools as an object": (Format.SHAREGPT, turns(HUMAN, tools=TOOL), "tools", LIST),
    "sharegpt, more pictures than marks": (
        Format.SHAREGPT,
        turns(HUMAN, GPT, images=["a.png"]),
        "images",
        "1 pictures are named, and 0 marks <image> stand in the questions",
    ),
    "sharegpt, a held picture": (
        Format.SHAREGPT,
        turns(HUMAN, images=[{"bytes": "x", "path": None}]),
        "images[0]",
        "a picture is named by path or address, not held",
    ),
    "sharegpt, no picture": (
        Format.SHAREGPT,
        turns(HUMAN, images=[7]),
        "images[0]",
        "path or address of a picture is expected",
    ),
    "sharegpt, videos": (
        Format.SHAREGPT,
        turns(HUMAN, videos=["a.mp4"]),
        "videos",
        "videos and sounds are not read",
    ),
    "openai, fewer places than pictures": (
        Format.OPENAI,
        {"messages": [ASKED], "images": ["a", "b"]},
        "images",
        "2 pictures are named, and the messages have 0 places for them",
    ),
    # ---- Alpaca ----
    "alpaca, no instruction": (Format.ALPACA, {"output": "x"}, "instruction", FIELD),
    "alpaca, empty": (
        Format.ALPACA,
        {"instruction": " ", "output": "x"},
        "instruction",
        "the question is empty",
    ),
    "alpaca, no output": (Format.ALPACA, {"instruction": "x"}, "completion", FIELD),
    "alpaca, output": (Format.ALPACA, {"instruction": "x", "output": 7}, "output", TEXT),
    "alpaca, input": (
        Format.ALPACA,
        {"instruction": "x", "input": [], "output": "y"},
        "input",
        TEXT,
    ),
    "alpaca, history": (
        Format.ALPACA,
        {"instruction": "x", "output": "y", "history": [["a"]]},
        "history[0]",
        "a list of question and answer is expected",
    ),
    "alpaca, history of numbers": (
        Format.ALPACA,
        {"instruction": "x", "output": "y", "history": [["a", 1]]},
        "history[0][1]",
        TEXT,
    ),
    # ---- prompt and completion ----
    "prompt, empty": (
        Format.PROMPT_COMPLETION,
        {"prompt": "", "completion": "x"},
        "prompt",
        "the question is empty",
    ),
    "prompt, number": (Format.PROMPT_COMPLETION, {"prompt": 7, "completion": "x"}, "prompt", TEXT),
    "prompt of bad messages": (
        Format.PROMPT_COMPLETION,
        {"prompt": [{"role": "user"}], "completion": "x"},
        "prompt[0]",
        "content is missing; only an assistant that calls tools may omit it",
    ),
    "completion without a role": (
        Format.PROMPT_COMPLETION,
        {"prompt": "x", "completion": {"content": "y"}},
        "completion.role",
        FIELD,
    ),
    # ---- preferences ----
    "preference, no prompt": (
        Format.PREFERENCE,
        {"chosen": "So.", "rejected": "No."},
        "prompt",
        "the question is missing",
    ),
    "preference, null": (Format.PREFERENCE, pair(chosen=None), "chosen", TEXT),
    "preference, role": (
        Format.PREFERENCE,
        pair(chosen=[{"role": "bot", "content": "x"}]),
        "chosen[0].role",
        "input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    "preference, same": (
        Format.PREFERENCE,
        pair(chosen=[ASKED, ANSWERED], rejected=[ASKED, ANSWERED]),
        "chosen",
        "nothing is left of this answer without what both begin with",
    ),
    "preference, other questions": (
        Format.PREFERENCE,
        pair(chosen=[ASKED, ANSWERED], rejected=[{**ASKED, "content": "What?"}, REFUSED]),
        "chosen[0].content",
        "the two answers belong to different questions",
    ),
    "preference, another prompt": (
        Format.PREFERENCE,
        pair(prompt="What?", chosen=[ASKED, ANSWERED], rejected=[ASKED, REFUSED]),
        "prompt",
        "the prompt is another than the question in chosen and rejected",
    ),
    "preference, transcript without an answer": (
        Format.PREFERENCE,
        pair(chosen="\n\nHuman: Why?"),
        "chosen",
        "the text ends without an answer of the assistant",
    ),
    "preference, pictures": (
        Format.PREFERENCE,
        pair(images=["a.png"]),
        "images",
        "pictures in preference pairs are not read",
    ),
    "preference, openai, input": (
        Format.PREFERENCE,
        openai_pair(input=7),
        "input",
        "an object with a list `messages` is expected",
    ),
    "preference, openai, messages": (
        Format.PREFERENCE,
        openai_pair(input={"messages": [{"role": "x", "content": "y"}]}),
        "input.messages[0].role",
        "input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    "preference, openai, output": (
        Format.PREFERENCE,
        openai_pair(preferred_output=7),
        "preferred_output",
        LIST,
    ),
    # ---- texts ----
    "text, number": (Format.TEXT, {"text": 7}, "text", TEXT),
    "text, missing": (Format.TEXT, {"a": 7}, "text", FIELD),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_by_its_place_in_the_file(name: str) -> None:
    form, value, path, reason = WRONG[name]
    assert error_of(form, value) == (path, reason)


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_any_value_in_any_field_is_a_record_or_a_sentence(name: str, data: st.DataObject) -> None:
    form, value, _ = GOOD[name]
    field = data.draw(st.sampled_from(sorted(value)))
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "from", "value", "name", "url"]), inner)
        ),
        max_leaves=5,
    )
    changed = {**value, field: data.draw(junk)}
    try:
        record = convert(changed, form)
    except RecordError as error:
        sentence = json.dumps([error.path, error.value, error.reason])
        event("a sentence")
    else:
        sentence = record.to_json()
        assert type(record).from_json(sentence) == record
    assert sentence


# ---- recognition ------------------------------------------------------------------------------


def test_a_mixed_file_is_in_the_format_of_most_of_its_records() -> None:
    values = [{"text": "x"}, *[{"messages": []}] * 2, {"a": 1}, 7]
    assert recognise(values) is Format.OPENAI
    assert recognise([{"text": "x"}, {"messages": []}]) is Format.TEXT


@pytest.mark.parametrize(
    "value",
    [
        {"question": "a", "answer": "b", "response": "c"},
        {"prompt": "a", "question": "b", "answer": "c"},
        {"instruction": "a", "output": "b", "response": "c"},
        {"text": "a", "answer": "b"},
        {"prompt": "a", "completion": "b", "label": True},
        {"messages": [], "label": False},
        {"prompt": None, "completion": "x"},
        {"a": 1},
        {},
        [],
        "x",
    ],
)
def test_what_fits_two_formats_or_none_is_not_guessed(value: Any) -> None:
    assert format_of(value) is None


UNKNOWN: dict[str, tuple[list[Any], str]] = {
    "columns": ([{"a": 1, "b\n": 2}], "The columns are a, b\\n; their meaning is not known."),
    "lists": ([[1]], "The records are lists, not objects."),
    "texts": (["x"], "The records are texts, not objects."),
    "nothing": ([None], "The records are null, not objects."),
    "none": ([], "The records are missing, not objects."),
    "unpaired": (
        [{"prompt": "a", "completion": "b", "label": True}],
        "The records are unpaired preferences: answers with a label of good or bad.",
    ),
    "messages": ([ASKED, ANSWERED], "The records are single messages."),
    "a list inside": (
        [{"version": 1, "data": [{"messages": []}]}],
        "The file is one object; its records seem to stand in its list `data`.",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_format_is_described(name: str) -> None:
    values, sentence = UNKNOWN[name]
    with pytest.raises(UnknownFormatError) as caught:
        recognise(values)
    assert caught.value.message == sentence
    assert caught.value.hint
    assert bool(caught.value.columns) is (name == "columns")


def test_every_format_has_a_title_and_a_kind() -> None:
    assert len({form.title for form in Format}) == len(Format)
    assert Format.SHAREGPT.kind is Format.COLUMNS.kind is Kind.CONVERSATIONS
    assert Format.PREFERENCE.kind is Kind.PREFERENCES
    assert Format.TEXT.kind is Kind.TEXTS


# ---- columns ----------------------------------------------------------------------------------


def test_chosen_columns_become_a_conversation() -> None:
    mapping = Mapping(system="s", user="q", assistant="a", reasoning="r")
    row = {"s": "Be brief.", "q": "Why?", "a": "So.", "r": "Hm.", "id": "1"}
    assert convert(row, Format.COLUMNS, mapping) == conversation(SYSTEM, USER, THINKING)
    empty = {**row, "s": "", "r": " ", "a": "<think>Hm.</think>So."}
    assert convert(empty, Format.COLUMNS, mapping) == conversation(USER, THINKING)
    numbers = convert({"q": 0.5, "a": True}, Format.COLUMNS, Mapping(user="q", assistant="a"))
    assert [message.content for message in numbers.messages] == ["0.5", "true"]  # type: ignore[union-attr]


def test_a_chosen_column_becomes_a_text() -> None:
    mapping = Mapping(text="body")
    assert (mapping.columns, mapping.kind) == (("body",), Kind.TEXTS)
    assert convert({"body": "Once."}, Format.COLUMNS, mapping) == PlainText(text="Once.")
    assert Mapping(user="q", assistant="a").kind is Kind.CONVERSATIONS


def test_bad_cells_are_named_by_their_column() -> None:
    mapping = Mapping(user="q", assistant="a")
    missing = error_of(Format.COLUMNS, {"q": "x"}, mapping)
    assert missing == ("a", "this column is missing")
    empty = error_of(Format.COLUMNS, {"q": " ", "a": "x"}, mapping)
    assert empty == ("q", "the question is empty")
    assert error_of(Format.COLUMNS, {"q": "x", "a": None}, mapping) == ("a", TEXT)
    with pytest.raises(ValueError, match="Mapping"):
        convert({}, Format.COLUMNS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text": "a", "user": "b"}, "for the text, or for question and answer, not both"),
        ({"user": "a", "assistant": None}, "a column for the question and one for the answer"),
        ({}, "a column for the question and one for the answer"),
        ({"user": "a", "assistant": "a"}, "each needs a column of its own"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Mapping(**fields)


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (
            ["Customer question", "Best Answer"],
            Mapping(user="Customer question", assistant="Best Answer"),
        ),
        (
            ["id", "System Prompt", "query", "thought", "reply"],
            Mapping(system="System Prompt", user="query", reasoning="thought", assistant="reply"),
        ),
        (["user_question", "question", "answer"], Mapping(user="question", assistant="answer")),
        (["id", "Content"], Mapping(text="Content")),
        (["id", "question"], None),
        ([], None),
    ],
)
def test_a_mapping_is_guessed_from_names(columns: list[str], mapping: Mapping | None) -> None:
    assert guess_mapping(columns) == mapping


def test_openai_messages_convert_as_the_domain_reads_them() -> None:
    value = {"messages": [ASKED, {**ANSWERED, "weight": 0}], "tools": [WRAPPED], "id": 7}
    assert convert(value, Format.OPENAI) == from_openai(value)
