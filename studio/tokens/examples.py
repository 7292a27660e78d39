"""Tokens and mask of a record: the one function that trainer and inspector read it with."""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from studio.domain.chat_template import Rendering
from studio.domain.conversation import Conversation, PlainText, Record
from studio.domain.reading import Reading
from studio.errors import InputError
from studio.tokens.skeleton import Skeletons
from studio.tokens.tokenizer import Ids, ModelTokenizer

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training example, whole.

    Attributes:
        line: Number of its record in the Dataset, from 0.
        mask: Which tokens are supervised.
        turns: Where each user turn that starts an exchange begins; before the first stand system
            message and tools.
        unwritten: Supervised replies whose thinking the template leaves out.
    """

    line: int
    tokens: Ids
    mask: Mask
    turns: Ids
    unwritten: int = 0

    @property
    def is_text(self) -> bool:
        """Whether it is a text without turns, learned as a whole."""
        return not len(self.turns) and bool(self.mask.all())


class ExampleMaker:
    """Turns records into examples for one model.

    Args:
        tokenizer: Of the model, with its chat template.
        reading: What is learned of the thinking.
    """

    def __init__(self, tokenizer: ModelTokenizer, reading: Reading = Reading()) -> None:
        self.tokenizer = tokenizer
        self.reading = reading
        self._skeletons = Skeletons(tokenizer.template, reading)

    def make(self, record: Record, number: int) -> list[Example]:
        """Return the examples of a record, untruncated; none where nothing is supervised.

        Args:
            record: A Conversation or a PlainText.
            number: Number of the record in its Dataset, from 0.

        Raises:
            InputError: The template refuses it, or it is a Preference.
        """
        if isinstance(record, PlainText):
            return [self._text(record, number)]
        return [self.example(rendering, number) for rendering in self.renderings(record)]

    def renderings(self, record: Record) -> list[Rendering]:
        """Return the texts of a record as the model reads them, with their supervised spans.

        Raises:
            InputError: The template refuses it, or it is a Preference.
        """
        if isinstance(record, PlainText):
            end = len(record.text)
            return [Rendering(text=record.text, spans=((0, end),))]
        if not isinstance(record, Conversation):
            raise InputError(
                "A preference holds a better and a worse reply, and this training learns one.",
                "Choose a dataset of conversations or texts.",
                field="data.dataset",
            )
        found = self._skeletons.renderings(record)
        if record.tools and found:
            # Before the first reply: in it, a call names its tool anyway.
            first = found[0]
            _check_tools_are_written(record, first.text[: first.spans[0][0]])
        return found

    def example(self, rendering: Rendering, number: int) -> Example:
        """Return tokens and mask of a text: a token is supervised where it begins in a span."""
        tokens, starts = self.tokenizer.encode(rendering.text)
        mask = np.zeros(len(tokens), dtype=np.bool_)
        bounds = np.searchsorted(starts, np.array(rendering.spans, dtype=np.int64).ravel())
        for first, end in bounds.reshape(-1, 2).tolist():
            mask[first:end] = True
        return Example(
            line=number,
            tokens=tokens,
            mask=mask,
            turns=np.searchsorted(starts, rendering.turns).astype(np.uint32),
            unwritten=rendering.unwritten,
        )

    def _text(self, record: PlainText, number: int) -> Example:
        tokens, _ = self.tokenizer.encode(record.text)
        end = self.tokenizer.end_of_text
        if end is None:
            raise InputError(
                "The model's tokenizer has no token that ends a text, <|endoftext|> or another.",
                "Choose a model whose tokenizer_config.json names its eos_token.",
            )
        tokens = np.append(tokens, np.uint32(end))
        return Example(
            line=number,
            tokens=tokens,
            mask=np.ones(len(tokens), dtype=np.bool_),
            turns=np.zeros(0, dtype=np.uint32),
        )


def _check_tools_are_written(conversation: Conversation, text: str) -> None:
    """Refuse a template that knows no tools: the model would call what it was never shown.

    Raises:
        InputError: A function of the conversation's tools is not named in the text.
    """
    for tool in conversation.tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and json.dumps(name, ensure_ascii=False)[1:-1] not in text:
            raise InputError(
                f"The model's chat template does not write the tool {name[:80]!r}.",
                "Choose a model whose template knows tools, or leave such conversations out.",
            )
