"""Proofs: what a falling loss does not show, measured on the real model, data and weights.

targets   the layers that carry a LoRA are the selected ones, and nothing else trains
coverage  how much of the base is really in 4 bits
mask      which tokens are supervised, with examples to read; that they are transformers' own
learned   the update B A of every target group is not zero
loss      it fell
"""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.domain.chat_template import readable
from studio.domain.proof import Proof
from studio.domain.reading import Reading
from studio.tokens.examples import Example
from workers.engine.data import Examples, conversations_to_compare
from workers.engine.report import peak_memory_bytes

NUM_SHOWN = 3
# Conversations, evenly spread, whose tokens are compared with transformers'.
NUM_COMPARED = 8
# Fewer steps than this say nothing about a trend.
MIN_STEPS = 10


def prove_mask(examples: Examples, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> Proof:
    """Count supervised tokens, show examples, and compare our tokens with transformers'.

    Args:
        examples: All that is trained on.
        tokenizer: As transformers loads it from the base's folder.
        reading: What is learned of the thinking.
    """
    num_tokens, num_supervised = int(examples.lengths.sum()), int(examples.supervised.sum())
    empty = int((examples.supervised == 0).sum())
    different, compared = _compare(examples, tokenizer, reading)
    summary = (
        f"{num_supervised:,} of {num_tokens:,} tokens are supervised "
        f"({num_supervised / num_tokens:.1%}), in {len(examples)} examples."
    )
    if empty:
        summary += f" {empty} examples have none."
    left_out = _left_out(examples)
    summary += left_out.pop("summary", "")
    if compared:
        summary += (
            f" The tokens of {len(different)} of {compared} conversations differ from transformers', "
            f"the first is line {different[0]}."
            if different
            else f" The tokens are identical to transformers' on {compared} conversations."
        )
    details = {
        "examples": len(examples),
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "share": num_supervised / num_tokens,
        "empty_examples": empty,
        "compared_with_transformers": compared,
        "different_from_transformers": different,
        **left_out,
        "shown": [
            _shown(examples[index], tokenizer) for index in range(min(NUM_SHOWN, len(examples)))
        ],
    }
    passed = num_supervised > 0 and not different
    return Proof(name="mask", passed=passed, summary=summary, details=details)


def _left_out(examples: Examples) -> dict[str, Any]:
    """Count what truncation takes away, and conversations with nothing to learn."""
    fitted = [source.fitted for source in examples.sources]
    lost = sum(one.lost_tokens for one in fitted)
    empty = sum(len(one.nothing_left()) for one in fitted)
    empty += sum(source.cache.meta.counts.num_unsupervised for source in examples.sources)
    found: dict[str, Any] = {
        "tokens_lost_by_truncation": lost,
        "supervised_tokens_lost_by_truncation": sum(one.lost_supervised for one in fitted),
        "conversations_with_nothing_left": empty,
    }
    if lost:
        found["summary"] = f" Truncation leaves {lost:,} tokens out."
    if empty:
        found["summary"] = (
            found.get("summary", "") + f" {empty} conversations have nothing to learn."
        )
    return found


def _compare(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> tuple[list[int], int]:
    """Return the lines whose tokens differ from transformers', from 1, and how many were looked at.

    Only the whole text of a conversation is compared: transformers has no notion of the others.
    """
    different, compared = [], 0
    source = examples.sources[0]
    lines = source.cache.lines
    for number, conversation in conversations_to_compare(source, NUM_COMPARED):
        messages, replies = readable(conversation, reading)
        expected: Any = tokenizer.apply_chat_template(
            messages[: replies[-1] + 1], tools=list(conversation.tools) or None, return_dict=True
        )
        last = int(np.searchsorted(lines, number, side="right")) - 1
        compared += 1
        if source.cache[last].tokens.tolist() != expected["input_ids"]:
            different.append(number + 1)
    return different, compared


def prove_all_train(model: PreTrainedModel) -> Proof:
    """Count the weights that train in a full fine-tuning: all of the text model's.

    Args:
        model: Before it is shared out among ranks.
    """
    total, trainable = model.num_parameters(), model.num_parameters(only_trainable=True)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    summary = f"{trainable:,} of the {total:,} weights of the text model train."
    if frozen:
        summary += f" {len(frozen)} tensors do not, the first is {frozen[0]}."
    details = {"trainable_parameters": trainable, "parameters": total, "frozen": frozen}
    return Proof(name="targets", passed=not frozen, summary=summary, details=details)


def prove_loss(
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    *,
    kept_step: int | None = None,
) -> Proof:
    """Compare the mean loss of the first and the last tenth of the steps.

    Args:
        losses: Of each step.
        evaluations: Step and loss on what was never trained on, the first one before any step; it
            informs.
        kept_step: Whose weights were kept where that is not the last one: later ones are left out.
    """
    taken = len(losses)
    if kept_step is not None:
        losses = losses[:kept_step]
        evaluations = [found for found in evaluations if found[0] <= kept_step]
    eval_losses = [loss for _, loss in evaluations]
    tenth = max(1, len(losses) // 10)
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    details: dict[str, float] = {"first_tenth": first, "last_tenth": last, "steps": len(losses)}
    unseen = ""
    if len(eval_losses) > 1:
        details |= {"eval_first": eval_losses[0], "eval_last": eval_losses[-1]}
        unseen = (
            f" On what it was not trained on it went from {eval_losses[0]:.3f} to "
            f"{eval_losses[-1]:.3f}."
        )
    if kept_step is not None:
        details |= {"kept_step": kept_step, "steps_taken": taken}
        unseen += f" What is kept is step {kept_step}, the best evaluation of {taken} steps taken."
    if len(losses) < MIN_STEPS:
        summary = f"{len(losses)} steps are too few to tell whether the loss falls.{unseen}"
        return Proof(name="loss", passed=None, summary=summary, details=details)
    summary = (
        f"The loss went from {first:.3f} to {last:.3f} (means of the first and last tenth).{unseen}"
    )
    return Proof(name="loss", passed=last < first, summary=summary, details=details)


def prove_throughput(seconds: Sequence[float], tokens: Sequence[int]) -> Proof:
    """Say how many real tokens a second the run read; it informs.

    The first steps compile kernels and fill caches, so the first fifth is left out.

    Args:
        seconds: Of each step.
        tokens: Real tokens of each step on all processes, padding left out.
    """
    if not seconds:
        return Proof(name="throughput", passed=None, summary="No step was taken.")
    first = len(seconds) // 5
    rates = [count / took for count, took in zip(tokens[first:], seconds[first:], strict=True)]
    rate = median(rates)
    peak = peak_memory_bytes()
    summary = (
        f"{rate:,.0f} real tokens a second (median of {len(rates)} steps); "
        f"at most {peak / 2**30:,.2f} GiB in memory."
    )
    details = {
        "tokens_per_second": rate,
        "steps": len(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "peak_memory_bytes": peak,
    }
    return Proof(name="throughput", passed=None, summary=summary, details=details)


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # From the mask itself, not from the spans that it was made of.
    segments = []
    tokens, mask = example.tokens.tolist(), example.mask.tolist()
    for is_supervised, run in groupby(range(len(mask)), key=lambda index: mask[index]):
        text = tokenizer.decode([tokens[index] for index in run])
        segments.append({"text": text, "supervised": is_supervised})
    return {"line": example.line + 1, "segments": segments}
