"""Skeletons: whatever the conversation and the template, what chat_template.renderings gives."""

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.domain.chat_template import Rendering, renderings
from studio.domain.conversation import Conversation, Message, ToolCall
from studio.domain.reading import Reading
from studio.errors import InputError
from studio.tokens.follow import why_not_followed
from studio.tokens.skeleton import Skeletons
from tests.conversations import EXAMPLES, NAMES, ODD_CONVERSATIONS, ODD_TEXTS, SOURCES

READINGS = [
    Reading(thinking=thinking, empty_think=empty)
    for thinking, empty in product(("train", "mask", "strip"), ("prompt", "train"))
]


def outcome(render: Any, conversation: Conversation) -> list[Rendering] | str:
    try:
        return list(render(conversation))
    except InputError as error:
        return error.message


def check(skeletons: Skeletons, conversation: Conversation) -> None:
    def plain(given: Conversation) -> Iterator[Rendering]:
        return renderings(skeletons.template, given, skeletons.reading)

    assert outcome(skeletons.renderings, conversation) == outcome(plain, conversation)


def refilled(conversation: Conversation, texts: Iterator[str]) -> Conversation:
    """Return a conversation of the same shape with other texts."""
    messages = [
        msgspec.structs.replace(
            message,
            content=next(texts),
            reasoning_content=None if message.reasoning_content is None else next(texts),
            tool_calls=tuple(
                ToolCall(
                    name=next(texts),
                    arguments={
                        key: next(texts) if isinstance(value, str) else value
                        for key, value in call.arguments.items()
                    },
                )
                for call in message.tool_calls
            ),
        )
        for message in conversation.messages
    ]
    return Conversation(messages=tuple(messages), tools=conversation.tools)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    conversation=ODD_CONVERSATIONS,
    reading=st.sampled_from(READINGS),
    texts=st.lists(ODD_TEXTS, min_size=7, max_size=7),
)
def test_it_gives_what_jinja_gives(
    name: str, conversation: Conversation, reading: Reading, texts: list[str]
) -> None:
    skeletons = Skeletons(SOURCES[name], reading)
    for _ in range(3):
        check(skeletons, conversation)
    others = cycle(texts)
    for _ in range(3):
        check(skeletons, refilled(conversation, others))
    assert skeletons.why_plain == ""


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_example_dataset_needs_jinja_only_for_new_shapes(name: str, reading: Reading) -> None:
    skeletons = Skeletons(SOURCES[name], reading)
    for _ in range(2):
        for conversation in EXAMPLES:
            check(skeletons, conversation)
    assert skeletons.why_plain == ""
    assert skeletons.num_plain < 40
    before = skeletons.num_plain
    for conversation in EXAMPLES:
        check(skeletons, conversation)
    assert skeletons.num_plain == before


def test_shapes_that_are_all_different_are_left_to_jinja() -> None:
    skeletons = Skeletons(SOURCES[NAMES[0]])
    for count in range(1, 30):
        pair = (Message(role="user", content="Q"), Message(role="assistant", content="A"))
        check(skeletons, Conversation(messages=pair * count))
    assert skeletons.num_plain == 29


# ---- templates that look into texts -------------------------------------------------------------

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
LOOP = "{% for m in messages %}" + HEADER + "BODY<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(body: str) -> str:
    return LOOP.replace("BODY", body) + PROMPT


LOOKING = [
    "{{ m.content | upper }}",
    "{{ m.content | replace('a', 'bb') }}",
    "{{ m.content[:3] }}",
    "{{ m.content[0] }}",
    "{{ m.content | length }}",
    "{% if m.content | length > 3 %}long{% endif %}{{ m.content }}",
    "{% for c in m.content %}{{ c }},{% endfor %}",
    "{{ m.content | tojson }}",
    "{{ m | tojson }}",
    "{{ messages | tojson }}",
    "{{ '%s!' % m.content }}",
    "{{ '%s!' | format(m.content) }}",
    "{{ '{}'.format(m.content) }}",
    "{{ [m.content, 'x'] | join('-') }}",
    "{{ m.content * 2 }}",
    "{{ m.content.upper() }}",
    "{{ m.content.replace('a', 'b') }}",
    "{{ m.content.split() | length }} {{ m.content }}",
    "{{ m.content.split('a') | first }}",
    "{{ m.content.split('a')[-1] }}",
    "{{ m.content ~ '!' }}",
    "{{ (m.content ~ '!') | trim }}",
    "{{ (m.content ~ '!') | length }}",
    "{{ ('x' + m.content) | trim }}",
    "{{ m.content in ['a', 'b'] }}",
    "{{ m.content in 'abc' }}",
    "{{ 'a' in m.content }}{{ m.content }}",
    "{{ m.content == 'a' }}",
    "{{ 'a' == m.content }}",
    "{{ m.content != 'a' }}{{ m.content }}",
    "{{ m.content < 'b' }}",
    "{{ {'a': 1}[m.content] }}",
    "{{ {m.content: 1} }}",
    "{{ m.content == messages[0].content }}",
    "{{ m.content.startswith(messages[0].content) }}",
    "{{ messages[0].content.endswith(m.content) }}",
    "{{ m.content is string }}{{ m.content }}",
    "{{ m.content is upper }}",
    "{{ m.content is sameas 'a' }}",
    "{{ m.content | default('x', true) }}",
    "{{ (m.content or 'none') }}",
    "{{ m.content | safe }}<b>",
    "{{ (m.content | safe) + '<b>' }}",
    "{{ ('a' | safe) + m.content }}",
    "{{ m.content | escape }}",
    "{{ m.content | string }}",
    "{{ m }}",
    "{{ m.items() }}",
    "{{ m | items | list }}",
    "{% set f = m.content.upper %}{{ f() }}",
    "{% set x %}{{ m.content }} {% endset %}{{ x | trim }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% macro f(x) %}{{ x }} {% endmacro %}{{ f(m.content) | trim }}|",
    "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(m.content) }}",
    "{{ m.content | trim | trim('a') }}",
    "{{ m.content.strip('a') + m.content.rstrip() }}",
    "{{ m.content }}{{ loop.changed(m.content) }}",
    "{{ strftime_now('%Y') }}{{ m.content }}",
    "{{ messages | map(attribute='content') | first }}",
    "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "{{ (messages | first).content }}",
    "{{ m.content if m.content else 'nothing' }}",
    "{{ tools[0].function.name if tools else '' }}{{ m.content }}",
    "{{ tools | string if tools else '' }}{{ m.content }}",
    "{{ tools[0] | string if tools else '' }}{{ m.content }}",
    "{{ tools[0] | length if tools else '' }}{{ m.content }}",
    "{{ tools[0] | tojson(indent=2) if tools else '' }}{{ m.content }}",
    "{{ m.tool_calls[0].function.arguments.a if m.tool_calls else '' }}{{ m.content }}",
    "{{ m.tool_calls[0].function | tojson if m.tool_calls else '' }}{{ m.content }}",
    "{% for k, v in m.tool_calls[0].function.arguments | items %}{{ k }}{{ v | string }}{% endfor %}",
    "{{ m.reasoning_content | default('', true) }}{{ m.content }}",
    "{{ '<|im_start|>' + m.content + '<|im_end|>' }}",
]
CONTENTS = ["a", "b ", "", "abab", " a\n", "<b>&", "bcd", "aaaaaa", "{{ a }}", "A"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": [1, {"b": "<"}]}}}


def conversations() -> Iterator[Conversation]:
    for index, content in enumerate(CONTENTS * 2):
        other = CONTENTS[index * 7 % len(CONTENTS)]
        call = ToolCall(name=f"f{other}", arguments={"a": content, "n": index, "o": {"x": [other]}})
        for calls, tools in (((), ()), ((call,), (TOOL, {"k": content}))):
            question = Message(role="user", content=content)
            answer = Message(
                role="assistant", content=other, reasoning_content=content, tool_calls=calls
            )
            yield Conversation(messages=(question, answer), tools=tools)


@pytest.mark.parametrize("body", LOOKING)
def test_a_template_that_looks_into_texts_gives_what_jinja_gives(body: str) -> None:
    skeletons = Skeletons(template(body))
    for conversation in conversations():
        check(skeletons, conversation)
    # Jinja alone, or nothing escaped: the last net has nothing to catch.
    assert "something else than was followed" not in skeletons.why_plain


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper }}",
        "{{ '%s!' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{{ [m.content, 'x'] | join('-') }}",
        "{{ m.content in 'abc' }}",
        "{{ 'abc'.startswith(m.content) }}",
        "{{ loop.changed(m.content) }}",
        "{{ strftime_now('%Y') }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
    ],
)
def test_what_could_look_unseen_is_not_followed(body: str) -> None:
    assert why_not_followed(template(body)).startswith("line 2 of the template: ")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_templates_are_followed(name: str) -> None:
    assert why_not_followed(SOURCES[name]) == ""
