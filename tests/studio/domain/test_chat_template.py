"""Chat templates: text as transformers renders it, and supervision of the replies alone."""

import re
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from studio.disk import TEMPLATES
from studio.domain.chat_template import Rendering, render, renderings
from studio.domain.conversation import Conversation, Message, ToolCall
from studio.domain.validation import Reader, check_rules
from studio.errors import InputError

NAMES = ("qwen3.5.jinja", "qwen3-next-instruct.jinja")
SOURCES = {name: (TEMPLATES / "chat" / name).read_text(encoding="utf-8") for name in NAMES}
THINKS = "qwen3.5.jinja"

with (TEMPLATES / "data" / "tidemark-support.jsonl").open("rb") as stream:
    EXAMPLES = list(Reader().read(stream))

# ---- conversations that validation accepts and both templates render ----------------------------

# Pieces at which templates trim, split or escape, besides ordinary text.
PIECES = st.text(max_size=8) | st.sampled_from(
    ["\n", " ", "\n\n", "<b>&'\"", "{{ x }}", "</tool_call>", "\u2028", "\U0001f30a", "assistant\n"]
)
TEXTS = st.lists(PIECES, max_size=4).map("".join).filter(lambda text: "<|" not in text)
WORDS = TEXTS.filter(lambda text: bool(text.strip()))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=2)
NAMES_OF_TOOLS = st.sampled_from(["get_tide", "f", "items"])
CALLS = st.builds(ToolCall, name=NAMES_OF_TOOLS, arguments=OBJECTS)
TOOLS = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": NAMES_OF_TOOLS, "parameters": OBJECTS}),
    }
)
message = partial(st.builds, Message)
REASONING = st.none() | TEXTS
ANSWERS = message(role=st.just("assistant"), content=WORDS, reasoning_content=REASONING)
QUESTIONS = message(role=st.just("user"), content=TEXTS.map(lambda text: f"Q{text}"))
STEPS = st.tuples(
    message(
        role=st.just("assistant"),
        content=TEXTS,
        reasoning_content=REASONING,
        tool_calls=st.lists(CALLS, min_size=1, max_size=2).map(tuple),
    ),
    message(role=st.just("tool"), content=TEXTS),
)


def flat(
    head: list[Message],
    rounds: list[tuple[Message, list[tuple[Message, ...]], list[Message]]],
    tools: list[dict[str, Any]],
    tail: list[Message],
) -> Conversation:
    messages = list(head)
    for question, steps, answers in rounds:
        messages += [question, *(part for step in steps for part in step), *answers]
    return Conversation(messages=(*messages, *tail), tools=tuple(tools))


CONVERSATIONS = st.builds(
    flat,
    st.lists(message(role=st.sampled_from(["system", "developer"]), content=TEXTS), max_size=1),
    st.lists(
        st.tuples(
            QUESTIONS, st.lists(STEPS, max_size=2), st.lists(ANSWERS, min_size=1, max_size=2)
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(TOOLS, max_size=2),
    st.lists(QUESTIONS, max_size=1),
)


@given(CONVERSATIONS)
def test_the_generated_conversations_are_ones_that_validation_accepts(
    conversation: Conversation,
) -> None:
    assert list(check_rules(conversation)) == []


# ---- rendering ----------------------------------------------------------------------------------


def transformers_text(
    name: str, messages: list[dict[str, Any]], conversation: Conversation, **options: Any
) -> str:
    tools: list[Any] | None = list(conversation.tools) or None
    # The annotation says str; what it returns is the list of texts and the list of their spans.
    rendered: Any = render_jinja_template(
        [messages], tools=tools, chat_template=SOURCES[name], **options
    )
    return str(rendered[0][0])


def check_rendering(name: str, conversation: Conversation) -> None:
    messages = conversation.template_messages()
    for options in (
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": True},
        {"add_generation_prompt": True, "enable_thinking": False},
    ):
        ours = render(SOURCES[name], messages, tools=conversation.tools, **options)
        assert ours == transformers_text(name, messages, conversation, **options)


@pytest.mark.parametrize("name", NAMES)
@given(conversation=CONVERSATIONS)
def test_text_is_what_transformers_renders(name: str, conversation: Conversation) -> None:
    check_rendering(name, conversation)


@pytest.mark.parametrize("name", NAMES)
def test_text_of_the_example_dataset_is_what_transformers_renders(name: str) -> None:
    for conversation in EXAMPLES:
        check_rendering(name, conversation)


FILTERS = (
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=true) }}",
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "  {% if true %}\n  x\n  {% endif %}\n",
    "{{ strftime_now('%Y')[:2] }}",
)


@pytest.mark.parametrize("source", FILTERS)
def test_filters_and_white_space_are_those_of_transformers(source: str) -> None:
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]
    theirs: Any = render_jinja_template([messages], chat_template=source)

    assert render(source, messages) == theirs[0][0]


# ---- supervision --------------------------------------------------------------------------------

# Read from the text alone: no content holds a control token, so blocks cannot be mistaken.
BLOCK = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
HEADERS = {
    "qwen3.5.jinja": ("<think>\n\n</think>\n\n", "<think>\n"),
    "qwen3-next-instruct.jinja": ("",),
}


def expected_spans(name: str, text: str) -> list[tuple[int, int]]:
    """Return where each reply of the text stands, from the end of its header.

    For Qwen3.5 only the replies after the last query have the header of a generation.
    """
    spans = []
    for block in BLOCK.finditer(text):
        header = next((h for h in HEADERS[name] if block[2].startswith(h)), None)
        if block[1] == "assistant" and header is not None:
            spans.append((block.start(2) + len(header), block.end()))
    return spans


def check_supervision(name: str, conversation: Conversation) -> None:
    source, messages = SOURCES[name], conversation.template_messages()
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found: list[tuple[Rendering, tuple[int, int]]] = []
    for rendering in renderings(source, conversation):
        spans = list(rendering.spans)
        assert spans == sorted(spans)
        assert spans == expected_spans(name, rendering.text)
        found += [(rendering, span) for span in spans]

    assert len(found) == len(replies)  # every reply once over the renderings, in order
    for index, (rendering, (start, end)) in zip(replies, found, strict=True):
        reply, supervised = messages[index], rendering.text[start:end]
        assert supervised.endswith("<|im_end|>")
        assert supervised.count("<|im_end|>") == 1
        assert "<|im_start|>" not in supervised
        assert reply["content"].strip() in supervised
        for call in reply.get("tool_calls", ()):
            assert call["function"]["name"] in supervised
        thought = (reply.get("reasoning_content") or "").strip() if name == THINKS else ""
        assert supervised.startswith(thought)
        # What the model sees before it is what it sees at inference.
        prompt = transformers_text(
            name,
            messages[:index],
            conversation,
            add_generation_prompt=True,
            enable_thinking=bool(thought),
        )
        assert rendering.text[:start] == prompt
        # And it has learned to say exactly what the template writes for it.
        whole = transformers_text(name, messages[: index + 1], conversation)
        assert whole == prompt + supervised + "\n"


@pytest.mark.parametrize("name", NAMES)
@given(conversation=CONVERSATIONS)
def test_every_reply_is_supervised_once_after_its_prompt_at_inference(
    name: str, conversation: Conversation
) -> None:
    check_supervision(name, conversation)


@pytest.mark.parametrize("name", NAMES)
def test_every_reply_of_the_example_dataset_is_supervised_once(name: str) -> None:
    for conversation in EXAMPLES:
        check_supervision(name, conversation)


TWO_ROUNDS = Conversation(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="One?"),
        Message(role="assistant", reasoning_content="Think.", content="First."),
        Message(role="user", content="Two?"),
        Message(role="assistant", content="Second."),
        Message(role="user", content="Three?"),
    )
)


def test_a_template_that_forgets_thoughts_gives_one_text_a_query_with_history_as_at_inference() -> (
    None
):
    first, second = renderings(SOURCES["qwen3.5.jinja"], TWO_ROUNDS)

    assert [first.text[start:end] for start, end in first.spans] == [
        "Think.\n</think>\n\nFirst.<|im_end|>"
    ]
    assert [second.text[start:end] for start, end in second.spans] == ["Second.<|im_end|>"]
    assert "Think." not in second.text
    assert "Three?" not in second.text


def test_a_template_that_keeps_history_gives_one_text_for_all_replies() -> None:
    (only,) = renderings(SOURCES["qwen3-next-instruct.jinja"], TWO_ROUNDS)

    assert [only.text[start:end] for start, end in only.spans] == [
        "First.<|im_end|>",
        "Second.<|im_end|>",
    ]


def test_a_thought_written_into_the_content_is_learned_as_a_thought() -> None:
    inline = Conversation(
        messages=(
            Message(role="user", content="One?"),
            Message(role="assistant", content="<think>\nThink.\n</think>\n\nFirst."),
        )
    )
    (only,) = renderings(SOURCES["qwen3.5.jinja"], inline)
    ((start, end),) = only.spans

    assert only.text[start:end] == "Think.\n</think>\n\nFirst.<|im_end|>"


def test_a_conversation_without_replies_gives_no_text() -> None:
    question = Conversation(messages=(Message(role="user", content="One?"),))

    assert list(renderings(SOURCES["qwen3.5.jinja"], question)) == []


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ raise_exception('No images.') }}", "No images."),
        ("{{ messages[0].content.upper(1) }}", "str.upper() takes no arguments (1 given)"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        (
            "{{ ''.__class__.__mro__ }}",
            "access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_a_template_that_fails_keeps_its_words(source: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        render(source, [{"role": "user", "content": "a"}])

    assert caught.value.message == f"The model's chat template refuses the conversation: {reason}."


def test_a_template_that_writes_replies_unlike_its_own_prompt_is_refused() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}reply: {% endif %}"
    )

    with pytest.raises(InputError, match="writes reply 2 differently"):
        list(
            renderings(source, TWO_ROUNDS.model_copy(update={"messages": TWO_ROUNDS.messages[1:3]}))
        )


def test_shipped_templates_say_source_roles_and_stop_tokens_in_their_first_line() -> None:
    assert {path.name for path in (TEMPLATES / "chat").glob("*.jinja")} == set(NAMES)
    for source in SOURCES.values():
        first = source.splitlines()[0]
        assert re.search(r"Source: https://\S+ .*Roles: .*Stop tokens: .*<\|im_end\|>", first)
