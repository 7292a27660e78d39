"""Examples, their order, and micro-batches; the cursor is the number of steps done.

The order is a pure function of seed and step: an endless stream of shuffled epochs, cut into
windows of a few steps. Inside a window the examples are sorted by length, so that a micro-batch
holds little padding, and the steps of the window are shuffled, so that length is no curriculum.
The split of a step into micro-batches changes neither its examples nor its loss.
Not covered: packing (state of the delta net would leak across examples without special kernels).
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from studio.domain.chat_template import Rendering, renderings
from studio.domain.conversation import Conversation
from studio.domain.spec import BatchSpec, TrainSpec
from studio.errors import EngineError

# B rows, T tokens
IGNORED = -100
WINDOW_STEPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One rendered and tokenised training example.

    Attributes:
        line: Line of the dataset that it comes from, from 1.
        labels: Its tokens where they are supervised, IGNORED elsewhere.
    """

    line: int
    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss; the first token of a text is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Examples of one forward pass, padded on the right.

    Attributes:
        tokens: (B, T), int64.
        mask: (B, T), int64, 1 for real tokens and 0 for padding.
        labels: (B, T), int64, IGNORED where nothing is supervised.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        return MicroBatch(
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
        )


def read_examples(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, *, max_length_tokens: int
) -> list[Example]:
    """Render and tokenise every Conversation of a canonical dataset.

    Args:
        dataset: Canonical JSONL.
        tokenizer: Its own chat template is what the model reads at inference.
        max_length_tokens: Longest example that is allowed.

    Raises:
        InputError: The template refuses a Conversation; the line is named.
        EngineError: Examples are longer than allowed, or there are none.
    """
    template = str(tokenizer.chat_template)
    examples = []
    with dataset.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            for rendering in renderings(template, Conversation.from_json(line)):
                examples.append(_tokenise(rendering, tokenizer, number))
    if not examples:
        raise EngineError("The dataset holds no examples.", "Choose another dataset.")
    _refuse_long(examples, max_length_tokens)
    return examples


def _tokenise(rendering: Rendering, tokenizer: PreTrainedTokenizerBase, line: int) -> Example:
    encoded = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = encoded["input_ids"]
    labels = [IGNORED] * len(tokens)
    for index, (start, _) in enumerate(encoded["offset_mapping"]):
        if any(first <= start < end for first, end in rendering.spans):
            labels[index] = tokens[index]
    return Example(line=line, tokens=tuple(tokens), labels=tuple(labels))


def _refuse_long(examples: Sequence[Example], max_length_tokens: int) -> None:
    long = [example for example in examples if len(example.tokens) > max_length_tokens]
    if long:
        longest = max(long, key=lambda example: len(example.tokens))
        raise EngineError(
            f"{len(long)} of {len(examples)} examples are longer than {max_length_tokens} tokens; "
            f"the longest is line {longest.line} of the dataset with {len(longest.tokens)} tokens.",
            f"Set the longest example to {len(longest.tokens)} or more, or shorten those lines.",
            "data.max_length_tokens",
        )


def count_steps(num_examples: int, batch: BatchSpec, train: TrainSpec) -> int:
    """Return the optimizer steps of a run: epochs, rounded up to whole steps, or max_steps."""
    steps = _steps_of_epochs(num_examples, batch, train)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def step_order(
    lengths: Sequence[int], batch: BatchSpec, train: TrainSpec, first_step: int = 0
) -> Iterator[tuple[int, ...]]:
    """Yield the examples of each step of a run.

    Args:
        lengths: Tokens of each example.
        batch: Micro-batch size times accumulation make a step.
        train: Its seed decides the order, its epochs and max_steps the end.
        first_step: Steps to leave out: the cursor of a Checkpoint.

    Yields:
        Indices into `lengths`, longest example first, so that memory peaks at once.
    """
    # max_steps cuts the run short; it does not change what the steps before it hold.
    end = _steps_of_epochs(len(lengths), batch, train)
    last = count_steps(len(lengths), batch, train)
    for start in range(first_step - first_step % WINDOW_STEPS, last, WINDOW_STEPS):
        window = _window(lengths, batch, train.seed, range(start, min(start + WINDOW_STEPS, end)))
        yield from window[max(0, first_step - start) : last - start]


def micro_batches(
    examples: Sequence[Example], size: int, pad_token_id: int
) -> Iterator[MicroBatch]:
    """Cut the examples of a step into micro-batches of `size`, each padded to its longest."""
    for start in range(0, len(examples), size):
        yield _collate(examples[start : start + size], pad_token_id)


def _collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    width = max(len(example.tokens) for example in examples)
    tokens_BT = torch.full((len(examples), width), pad_token_id)
    mask_BT = torch.zeros((len(examples), width), dtype=torch.long)
    labels_BT = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens_BT[row, :length] = torch.tensor(example.tokens)
        mask_BT[row, :length] = 1
        labels_BT[row, :length] = torch.tensor(example.labels)
    return MicroBatch(tokens=tokens_BT, mask=mask_BT, labels=labels_BT)


def _step_size(batch: BatchSpec) -> int:
    return batch.micro_batch_size * batch.gradient_accumulation_steps


def _steps_of_epochs(num_examples: int, batch: BatchSpec, train: TrainSpec) -> int:
    # 1e-9: 0.1 epochs of 30 examples are 3 examples, not 3.0000000000000004.
    return max(1, math.ceil(num_examples * train.epochs / _step_size(batch) - 1e-9))


def _window(
    lengths: Sequence[int], batch: BatchSpec, seed: int, steps: range
) -> list[tuple[int, ...]]:
    size = _step_size(batch)
    stream = []
    for position in range(steps.start * size, steps.stop * size):
        epoch, place = divmod(position, len(lengths))
        stream.append(_epoch_order(len(lengths), seed, epoch)[place])
    stream.sort(key=lambda index: (-lengths[index], index))
    cut = [tuple(stream[at : at + size]) for at in range(0, len(stream), size)]
    random.Random(f"window {seed} {steps.start}").shuffle(cut)
    return cut


@lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
