"""Conversations that property tests draw, and those of the example data set."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation, Message, ToolCall
from studio.domain.openai_messages import from_openai

CHAT = TEMPLATES / "chat"
NAMES = ("qwen3.5.jinja", "qwen3-next-instruct.jinja", "qwen3-next-thinking.jinja")
SOURCES = {name: (CHAT / name).read_text(encoding="utf-8") for name in NAMES}
_FILE = TEMPLATES / "data" / "tidemark-support.jsonl"
EXAMPLES = [
    from_openai(json.loads(line)) for line in _FILE.read_text(encoding="utf-8").splitlines()
]

# Pieces at which templates trim, split or escape, besides ordinary text.
PIECES = st.text(max_size=8) | st.sampled_from(
    ["\n", " ", "\n\n", "<b>&'\"", "{{ x }}", "</tool_call>", "\u2028", "\U0001f30a", "assistant\n"]
)
TEXTS = st.lists(PIECES, max_size=4).map("".join).filter(lambda text: "<|" not in text)
WORDS = TEXTS.filter(lambda text: bool(text.strip()))
# Pieces that stand for something to a template or to a reader of its text.
ODD_PIECES = PIECES | st.sampled_from(
    [
        "<think>",
        "<think>\n",
        "</think>",
        "\n</think>\n\n",
        "<tool_response>",
        "</tool_response>",
        "<|im_end|>",
        "<|im_start|>user\n",
        "<|im_",
        "\0",
        "\U000f5eed",
        ".",
    ]
)
ODD_TEXTS = st.lists(ODD_PIECES, max_size=4).map("".join)


def values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Return values of JSON with such texts."""
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
        max_leaves=3,
    )


def objects(texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects of JSON with such texts."""
    return st.dictionaries(texts, values(texts), max_size=2)


NAMES_OF_TOOLS = st.sampled_from(["get_tide", "f", "items"])
TOOLS = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": NAMES_OF_TOOLS, "parameters": objects(TEXTS)}),
    }
)
message = partial(st.builds, Message)
QUESTIONS = message(role=st.just("user"), content=TEXTS.map(lambda text: f"Q{text}"))


def calls(texts: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[ToolCall, ...]]:
    """Return one or two calls of tools."""
    call = st.builds(ToolCall, name=NAMES_OF_TOOLS, arguments=objects(texts))
    return st.lists(call, min_size=1, max_size=2).map(tuple)


def rounds(
    questions: st.SearchStrategy[Message],
    texts: st.SearchStrategy[str],
    words: st.SearchStrategy[str],
    weights: st.SearchStrategy[int] = st.just(1),
) -> st.SearchStrategy[list[Message]]:
    """Return an exchange: a question, steps with tools, answers."""
    reasoning = st.none() | texts
    answers = message(
        role=st.just("assistant"), content=words, reasoning_content=reasoning, weight=weights
    )
    callers = message(
        role=st.just("assistant"),
        content=texts,
        reasoning_content=reasoning,
        tool_calls=calls(texts),
        weight=weights,
    )
    results = st.lists(message(role=st.just("tool"), content=texts), min_size=2, max_size=2)
    step = st.tuples(callers, results).map(
        lambda found: [found[0], *found[1][: len(found[0].tool_calls)]]
    )
    return st.tuples(
        questions,
        st.lists(step, max_size=2),
        st.lists(answers, min_size=1, max_size=2),
    ).map(lambda found: [found[0], *(part for pair in found[1] for part in pair), *found[2]])


def replies_to_itself(conversation: Conversation, *, thinks: bool = True) -> bool:
    """Tell whether a reply that does not think is followed by another one.

    The Thinking template writes such a reply with a think block in the prompt of the next one, and
    without it afterwards, so that nobody can tell what the next one is to be learned from.
    """
    messages = conversation.messages
    return any(
        one.role == other.role == "assistant"
        and not (thinks and (one.reasoning_content or "").strip("\n"))
        for one, other in pairwise(messages)
    )


def flat(
    head: list[Message],
    exchanges: Sequence[list[Message]],
    tools: list[dict[str, Any]],
    tail: list[Message],
) -> Conversation:
    """Return one Conversation of these parts."""
    messages = [*head, *(part for exchange in exchanges for part in exchange), *tail]
    return Conversation(messages=tuple(messages), tools=tuple(tools))


SYSTEMS = message(role=st.sampled_from(["system", "developer"]), content=TEXTS)
# What validation accepts and every template renders.
CONVERSATIONS = st.builds(
    flat,
    st.lists(SYSTEMS, max_size=1),
    st.lists(rounds(QUESTIONS, TEXTS, WORDS), min_size=1, max_size=3),
    st.lists(TOOLS, max_size=2),
    st.lists(QUESTIONS, max_size=1),
)
# What may come out of a file all the same.
ODD_QUESTIONS = message(role=st.just("user"), content=ODD_TEXTS)
ODD_CONVERSATIONS = st.builds(
    flat,
    st.lists(message(role=st.sampled_from(["system", "developer"]), content=ODD_TEXTS), max_size=1),
    st.lists(
        rounds(ODD_QUESTIONS, ODD_TEXTS, ODD_TEXTS, st.sampled_from([0, 1])),
        min_size=1,
        max_size=3,
    ),
    st.lists(TOOLS, max_size=2),
    st.lists(ODD_QUESTIONS, max_size=1),
)
