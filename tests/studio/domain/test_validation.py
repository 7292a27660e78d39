"""Each rule finds what it is for, names the place, and leaves what is right alone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.conversation import (
    Conversation,
    Message,
    PlainText,
    Preference,
    Record,
    ToolCall,
)
from studio.domain.validation import (
    Issue,
    Report,
    check_control_characters,
    check_record,
    check_rules,
    short,
)

USER = Message(role="user", content="Is it covered?")
ASSISTANT = Message(role="assistant", content="Yes, for 31 months.")
SYSTEM = Message(role="system", content="Be brief.")


def calling(*ids: str | None, name: str = "get") -> Message:
    calls = tuple(ToolCall(id=id_, name=name, arguments={}) for id_ in ids)
    return Message(role="assistant", tool_calls=calls)


def result(id_: str | None) -> Message:
    return Message(role="tool", content="17:50", tool_call_id=id_)


def found(*messages: Message, **fields: Any) -> list[tuple[str, str, str]]:
    issues = check_rules(Conversation(messages=messages, **fields))
    return [(issue.severity, issue.kind, issue.path) for issue in issues]


@pytest.mark.parametrize(
    "messages",
    [
        (USER, ASSISTANT),
        (SYSTEM, USER, ASSISTANT, USER, ASSISTANT),
        (Message(role="developer", content="Be brief."), USER, ASSISTANT),
        (USER, ASSISTANT, USER),
        (USER, calling("a"), result("a"), ASSISTANT),
        (USER, calling("a", "b"), result("b"), result("a"), ASSISTANT),
        (USER, calling(None, None), result(None), result(None), ASSISTANT),
        (USER, calling("a"), result("a"), calling("a"), result("a"), ASSISTANT),
        (USER, calling("a"), result("a"), result("a"), ASSISTANT),
        (USER, calling("a", "b")),
        (USER, Message(role="assistant", content="a", weight=0), USER, ASSISTANT),
        (USER, Message(role="assistant", content="<a> | <|", reasoning_content="")),
        (Message(role="user"), ASSISTANT),
    ],
)
def test_nothing_is_found_in_what_is_right(messages: tuple[Message, ...]) -> None:
    assert found(*messages) == []


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ((USER,), [("error", "no_assistant", "messages")]),
        (
            (SYSTEM, ASSISTANT),
            [("error", "no_user", "messages"), ("warning", "alternation", "messages[1].role")],
        ),
        (
            (USER, Message(role="assistant", content=" \n")),
            [("warning", "empty_answer", "messages[1].content")],
        ),
        (
            (USER, Message(role="assistant", content="a", weight=0)),
            [("error", "weight", "messages")],
        ),
        ((USER, SYSTEM, ASSISTANT), [("error", "system", "messages[1].role")]),
        ((SYSTEM, SYSTEM, USER, ASSISTANT), [("error", "system", "messages[1].role")]),
        ((ASSISTANT, USER, ASSISTANT), [("warning", "alternation", "messages[0].role")]),
        ((USER, USER, ASSISTANT), [("warning", "alternation", "messages[1].role")]),
        ((USER, ASSISTANT, ASSISTANT), [("warning", "alternation", "messages[2].role")]),
        ((USER, result("a"), ASSISTANT), [("error", "tool_result", "messages[1]")]),
        (
            (USER, calling("a"), result("a"), result("b"), ASSISTANT),
            [("error", "tool_result", "messages[3].tool_call_id")],
        ),
        (
            (USER, calling("a"), USER, ASSISTANT),
            [("warning", "tool_call", "messages[1].tool_calls[0]")],
        ),
        (
            (USER, calling("a", "b", "c"), result("b"), ASSISTANT),
            [
                ("warning", "tool_call", "messages[1].tool_calls[0]"),
                ("warning", "tool_call", "messages[1].tool_calls[2]"),
            ],
        ),
        (
            (USER, calling("a", "b"), result("b")),
            [("warning", "tool_call", "messages[1].tool_calls[0]")],
        ),
        (
            (Message(role="user", content="<|im_end|>"), ASSISTANT),
            [("error", "control_token", "messages[0].content")],
        ),
        (
            (USER, Message(role="assistant", content="a", reasoning_content="<|im_start|>")),
            [("error", "control_token", "messages[1].reasoning_content")],
        ),
    ],
)
def test_what_is_wrong_is_found_at_its_place(
    messages: tuple[Message, ...], expected: list[tuple[str, str, str]]
) -> None:
    assert found(*messages) == expected


@pytest.mark.parametrize("tool", [{"function": {"name": "get"}}, {"name": "get"}])
def test_a_call_of_a_declared_tool_is_right_and_of_another_a_warning(tool: dict[str, Any]) -> None:
    right = (USER, calling("a"), result("a"), ASSISTANT)
    wrong = (USER, calling("a", name="set"), result("a"), ASSISTANT)

    assert found(*right, tools=(tool,)) == []
    assert found(*wrong, tools=(tool,)) == [
        ("warning", "tool_undeclared", "messages[1].tool_calls[0].function.name")
    ]
    assert found(*wrong) == []


def test_control_tokens_are_found_in_calls_and_tools() -> None:
    call = ToolCall(name="get", arguments={"at": "<|im_end|>"})
    message = Message(role="assistant", tool_calls=(call,))

    assert found(USER, message) == [("error", "control_token", "messages[1].tool_calls[0]")]
    assert found(USER, ASSISTANT, tools=({"name": "<|endoftext|>"},)) == [
        ("error", "control_token", "tools[0]")
    ]


MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "developer", "user", "user", "assistant", "assistant", "tool"]),
    content=st.sampled_from(["", " ", "a", "b", "<", "a<|im_end|>", "<|im"]),
    reasoning_content=st.sampled_from([None, None, "", "a", "<|im_start|>"]),
    tool_calls=st.sampled_from([(), (), (), calling("a").tool_calls]),
    weight=st.sampled_from([1, 1, 0]),
)


@given(st.lists(MESSAGES, min_size=1, max_size=5).map(tuple))
def test_the_glance_passes_only_what_every_rule_passes(messages: tuple[Message, ...]) -> None:
    conversation = Conversation(messages=messages)
    # Tools with nothing in them make the rules look at everything.
    thorough = Conversation(messages=messages, tools=({"name": "get"},))

    assert list(check_rules(conversation)) == list(check_rules(thorough))


# ---- other records ----------------------------------------------------------------------------


def test_a_preference_is_checked_with_either_answer() -> None:
    empty = Message(role="assistant", content="")
    broken = Preference(messages=(USER,), chosen=(ASSISTANT, USER, USER), rejected=(empty,))

    assert [(issue.kind, issue.path) for issue in check_record(broken)] == [
        ("alternation", "chosen[2].role"),
        ("empty_answer", "rejected[0].content"),
    ]


def test_what_is_wrong_in_the_prompt_of_a_preference_is_found_once() -> None:
    prompt = (SYSTEM, Message(role="user", content="<|im_end|>"))
    other = Message(role="assistant", content="No.")
    record = Preference(messages=prompt, chosen=(ASSISTANT,), rejected=(other,))

    assert [(issue.kind, issue.path) for issue in check_record(record)] == [
        ("control_token", "messages[1].content")
    ]


def test_two_equal_answers_are_no_preference() -> None:
    record = Preference(messages=(USER,), chosen=(ASSISTANT,), rejected=(ASSISTANT,))

    assert [str(issue) for issue in check_record(record)] == [
        "rejected: the rejected answer is the chosen one"
    ]


def test_a_preference_without_a_question_is_refused_in_either_answer() -> None:
    other = Message(role="assistant", content="No.")
    record = Preference(messages=(SYSTEM,), chosen=(ASSISTANT,), rejected=(other,))

    errors = [issue.path for issue in check_record(record) if issue.severity == "error"]
    assert errors == ["chosen", "rejected"]


@pytest.mark.parametrize(
    ("text", "kinds"), [("a", []), (" \n", ["empty_text"]), ("a<|im_end|>", ["control_token"])]
)
def test_a_text_has_something_in_it_and_no_control_token(text: str, kinds: list[str]) -> None:
    assert [issue.kind for issue in check_record(PlainText(text=text))] == kinds


@pytest.mark.parametrize("character", ["\0", "\x08", "\x0b", "\x0c", "\x1b", "\x1f"])
def test_a_control_character_is_a_warning_wherever_it_stands(character: str) -> None:
    text = f"ab{character}"
    wrong = Message(role="assistant", content=text)
    records: dict[str, Record] = {
        "text": PlainText(text=text),
        "messages[1].content": Conversation(messages=(USER, wrong)),
        "rejected[0].content": Preference(messages=(USER,), chosen=(ASSISTANT,), rejected=(wrong,)),
    }

    for path, record in records.items():
        issue = next(check_control_characters(record))
        assert (issue.path, issue.severity, issue.kind) == (path, "warning", "control_character")
        assert "character 3" in issue.reason
    assert list(check_control_characters(PlainText(text="\t\r\n\x7f"))) == []


# ---- findings and the Report ------------------------------------------------------------------


def test_a_finding_is_one_sentence() -> None:
    issue = Issue(line=7, file="a.jsonl", path="messages[2].role", value="bot", reason="wrong")

    assert str(issue) == "a.jsonl, line 7, messages[2].role: wrong (found bot)"
    assert str(Issue(line=0, reason="wrong")) == "wrong"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "a"),
        ("a" * 80, "a" * 80),
        ("a" * 81, "a" * 79 + "…"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ("a\n\x1b\u202e", "a\\n\\x1b\\u202e"),
    ],
)
def test_values_are_shown_on_one_short_line(value: object, shown: str) -> None:
    assert short(value) == shown


def test_a_report_is_accepted_without_errors_and_salvageable_without_those_of_the_file() -> None:
    good = Report(num_conversations=1)
    bad_records = Report(num_conversations=1, num_errors=2)
    bad_file = Report(num_conversations=1, num_errors=2, num_file_errors=1)
    empty = Report(num_errors=2)

    assert [report.is_accepted for report in (good, bad_records, bad_file, empty)] == [
        True,
        False,
        False,
        False,
    ]
    assert [report.is_salvageable for report in (good, bad_records, bad_file, empty)] == [
        False,
        True,
        False,
        False,
    ]


def test_a_report_of_an_older_studio_can_still_be_read() -> None:
    old = {
        "format": "OpenAI messages, JSON lines",
        "num_lines": 1,
        "num_conversations": 1,
        "issues": [{"line": 1, "reason": "a", "severity": "note"}],
    }

    assert Report.model_validate(old).issues[0].kind == ""
