"""The template of the first Qwen3: the text of transformers, the mask by hand, the fast path."""

from itertools import cycle, product
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from studio.domain.chat_template import render, renderings
from studio.domain.conversation import Conversation, Message
from studio.domain.reading import Reading
from studio.tokens.follow import why_not_followed
from studio.tokens.skeleton import Skeletons
from tests.conversations import (
    CHAT,
    CONVERSATIONS,
    EXAMPLES,
    ODD_CONVERSATIONS,
    ODD_TEXTS,
    replies_to_itself,
)
from tests.studio.tokens.test_skeleton import check, refilled

TEMPLATE = (CHAT / "qwen3.jinja").read_text(encoding="utf-8")
READINGS = [
    Reading(thinking=thinking, empty_think=empty)
    for thinking, empty in product(("train", "mask", "strip"), ("prompt", "train"))
]
QUESTION = Message(role="user", content="Why?")


def said(reply: Message, **reading: Any) -> list[tuple[str, str]]:
    """Return what stands before and in what is learned of one reply."""
    conversation = Conversation(messages=(QUESTION, reply))
    (found,) = renderings(TEMPLATE, conversation, Reading(**reading))
    return [(found.text[:start], found.text[start:end]) for start, end in found.spans]


def test_it_names_its_source_in_its_first_line() -> None:
    first = TEMPLATE.splitlines()[0]
    assert first.startswith("{#- Source: https://huggingface.co/Qwen/Qwen3-8B (Apache-2.0)")
    assert first.endswith("-#}")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONVERSATIONS, st.sampled_from([None, True, False]), st.booleans())
def test_its_text_is_that_of_transformers(
    conversation: Conversation, thinks: bool | None, asks: bool
) -> None:
    messages = conversation.template_messages()
    tools: list[Any] | None = list(conversation.tools) or None
    options: dict[str, Any] = {"add_generation_prompt": asks}
    if thinks is not None:
        options["enable_thinking"] = thinks
    # The annotation says str; what it returns is the list of texts and the list of their spans.
    found: Any = render_jinja_template([messages], tools=tools, chat_template=TEMPLATE, **options)
    ((theirs,), _) = found
    assert render(TEMPLATE, messages, tools=conversation.tools, **options) == theirs


HEAD = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nHm.\n</think>\n\n"


def test_a_reply_that_thinks_is_learned_with_its_thinking() -> None:
    reply = Message(role="assistant", content="So.", reasoning_content="Hm.")

    assert said(reply) == [(HEAD, THOUGHT + "So.<|im_end|>")]
    assert said(reply, thinking="mask") == [(HEAD + THOUGHT, "So.<|im_end|>")]
    assert said(reply, thinking="strip") == [(HEAD + EMPTY, "So.<|im_end|>")]


def test_a_reply_that_does_not_think_has_its_empty_block_where_inference_has_it() -> None:
    reply = Message(role="assistant", content="So.")

    # With thinking off, the prompt at inference ends with the empty block.
    prompt = render(
        TEMPLATE,
        Conversation(messages=(QUESTION,)).template_messages(),
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert prompt == HEAD + EMPTY
    assert said(reply, empty_think="prompt") == [(prompt, "So.<|im_end|>")]
    assert said(reply, empty_think="train") == [(HEAD, EMPTY + "So.<|im_end|>")]


def test_earlier_replies_lose_their_thinking_as_at_inference() -> None:
    rounds = [QUESTION, Message(role="assistant", content="One.", reasoning_content="Hm.")] * 2
    first, second = renderings(TEMPLATE, Conversation(messages=tuple(rounds)))

    assert first.text.count("Hm.") == second.text.count("Hm.") == 1
    assert "assistant\nOne.<|im_end|>" in second.text


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    conversation=ODD_CONVERSATIONS,
    reading=st.sampled_from(READINGS),
    texts=st.lists(ODD_TEXTS, min_size=7, max_size=7),
)
def test_the_fast_path_gives_what_jinja_gives(
    conversation: Conversation, reading: Reading, texts: list[str]
) -> None:
    skeletons = Skeletons(TEMPLATE, reading)
    others = cycle(texts)
    for _ in range(3):
        check(skeletons, conversation)
        check(skeletons, refilled(conversation, others))
    assert skeletons.why_plain == ""


def test_the_example_dataset_takes_the_fast_path() -> None:
    skeletons = Skeletons(TEMPLATE, Reading())
    for conversation in EXAMPLES * 2:
        check(skeletons, conversation)
    assert skeletons.num_plain < 40
    assert why_not_followed(TEMPLATE) == ""


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONVERSATIONS)
def test_every_reply_is_learned_to_its_end(conversation: Conversation) -> None:
    assume(not replies_to_itself(conversation))
    learned = [
        rendering.text[start:end]
        for rendering in renderings(TEMPLATE, conversation)
        for start, end in rendering.spans
    ]
    assert all(text.endswith("<|im_end|>") for text in learned)
    assert len(learned) == sum(m.role == "assistant" for m in conversation.messages)
