"""What is counted over the conversations of a Dataset while they are tokenised."""

from collections import Counter
from typing import Any

import numpy as np
from pydantic import Field

from studio.domain.conversation import Conversation, Record
from studio.domain.section import Section
from studio.errors import InputError
from studio.tokens.examples import Example, ExampleMaker
from studio.tokens.limits import memory_words

LISTED = 20
_MAX_TOOLS = 1000


class Refused(Section):
    """A conversation that no example stands for.

    Attributes:
        number: Its number in the shard or Dataset, from 0.
    """

    number: int
    message: str


class Counts(Section):
    """What was counted over conversations.

    Attributes:
        tools: Calls of each tool in the conversations.
        exchanges: Conversations by their number of user turns.
        with_thinking: Conversations in which an assistant thinks.
        with_empty_think: Conversations with an empty think block.
        thinking_left_out: Conversations whose thinking this template does not write.
        num_refused: Conversations that the template refuses; `refused` lists the first.
        num_unsupervised: Conversations in which nothing is to be learned, since no reply has a
            weight; `unsupervised` lists the first.
    """

    num_conversations: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    roles: dict[str, int] = Field(default_factory=dict)
    tools: dict[str, int] = Field(default_factory=dict)
    exchanges: dict[int, int] = Field(default_factory=dict)
    with_thinking: int = 0
    with_empty_think: int = 0
    thinking_left_out: int = 0
    num_refused: int = 0
    refused: tuple[Refused, ...] = ()
    num_unsupervised: int = 0
    unsupervised: tuple[int, ...] = ()


def num_supervised(mask: np.ndarray) -> int:
    """Return the tokens that count in the loss; the first token of a text is never predicted."""
    return int(np.count_nonzero(mask[1:]))


class Tally:
    """Makes the examples of each record, and counts.

    Args:
        maker: Makes the examples.
        memory_bytes: What this process may use; a template that wants more is refused.
    """

    def __init__(self, maker: ExampleMaker, memory_bytes: int) -> None:
        self._maker, self._memory_bytes = maker, memory_bytes
        self._unsupervised: list[int] = []
        self._numbers: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._tools: Counter[str] = Counter()
        self._exchanges: Counter[int] = Counter()
        self._refused: list[Refused] = []

    def examples(self, record: Record, number: int) -> list[Example]:
        """Return the examples of a record; one that the template refuses has none."""
        self._numbers["num_conversations"] += 1
        if isinstance(record, Conversation):
            self._look_at(record)
        try:
            examples = self._maker.make(record, number)
        except InputError as error:
            self._refuse(number, error.message)
            return []
        except MemoryError:
            self._refuse(number, memory_words(self._memory_bytes)[0])
            return []
        if not examples:
            self._numbers["num_unsupervised"] += 1
            self._unsupervised += [number] * (len(self._unsupervised) < LISTED)
        self._numbers["num_examples"] += len(examples)
        self._numbers["num_tokens"] += sum(len(example.tokens) for example in examples)
        self._numbers["num_supervised"] += sum(num_supervised(e.mask) for e in examples)
        self._numbers["thinking_left_out"] += any(example.unwritten for example in examples)
        return examples

    def counts(self) -> Counts:
        """Return what was counted so far."""
        return Counts(
            **self._numbers,
            roles=dict(self._roles),
            tools=dict(self._tools),
            exchanges=dict(self._exchanges),
            refused=tuple(self._refused),
            unsupervised=tuple(self._unsupervised),
        )

    def _look_at(self, conversation: Conversation) -> None:
        messages = conversation.messages
        self._roles.update(message.role for message in messages)
        self._exchanges[sum(message.role == "user" for message in messages)] += 1
        thoughts = [m.reasoning_content for m in messages if m.reasoning_content is not None]
        self._numbers["with_thinking"] += any(thought.strip() for thought in thoughts)
        self._numbers["with_empty_think"] += any(not thought.strip() for thought in thoughts)
        for message in messages:
            for call in message.tool_calls:
                known = call.name in self._tools or len(self._tools) < _MAX_TOOLS
                self._tools[call.name if known else "(others)"] += 1

    def _refuse(self, number: int, words: str) -> None:
        self._numbers["num_refused"] += 1
        if len(self._refused) < LISTED:
            self._refused.append(Refused(number=number, message=words))


def merge_counts(all_counts: list[Counts]) -> Counts:
    """Return the counts of a Dataset from those of its shards, in order."""
    sums: Counter[str] = Counter()
    counters: dict[str, Counter[Any]] = {
        name: Counter() for name in ("roles", "tools", "exchanges")
    }
    refused: list[Refused] = []
    unsupervised: list[int] = []
    for counts in all_counts:
        first = sums["num_conversations"]
        unsupervised += [first + number for number in counts.unsupervised]
        refused += [
            item.model_copy(update={"number": first + item.number}) for item in counts.refused
        ]
        values = counts.model_dump(exclude={*counters, "refused", "unsupervised"})
        sums.update(values)
        for name, counter in counters.items():
            counter.update(counts.model_dump(include={name})[name])
    return Counts(
        **sums,
        **{name: dict(counter.most_common()) for name, counter in counters.items()},
        refused=tuple(refused[:LISTED]),
        unsupervised=tuple(unsupervised[:LISTED]),
    )
