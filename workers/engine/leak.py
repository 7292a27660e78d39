"""Whether the documents of a packed micro-batch are kept apart, measured on the run's own model.

The first document of a real row gets other tokens; the outputs of all the others must not move.
How much is "not" is measured too: behind the row of the others the first document can change
nothing of them, because every part of the model looks back only. What moves them there is
rounding: experts get other tokens beside theirs, and a GPU may add in another order.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from studio.domain.proof import Proof
from workers.engine.batches import MicroBatch, Packed
from workers.engine.lora import base_of

# T tokens, D hidden
NAME = "leak"
# How much more than measured rounding is still rounding, and the least that is allowed, beside one
# unit of the last place: 16 bits have 0.8 %. A leak through the convolution alone, which only
# reaches three tokens, moves two-layer random models by 7 % and more: see the tests.
_SLACK, _LEAST = 4.0, 1e-5
_SEED = 1


@torch.no_grad()
def prove_leak(model: PeftModel | PreTrainedModel, batch: MicroBatch) -> Proof:
    """Change the first document of a packed micro-batch, and see who notices.

    Five forward passes, without dropout.

    Args:
        model: After `enable_packing`; its mode is as before afterwards.
        batch: A real packed micro-batch, on the model's device.

    Returns:
        The Proof `leak`: failed when an output of another document moved by more than rounding
        does, or when the first one's own did not move. Only informs where the micro-batch holds
        one document, or is not packed.
    """
    packed = batch.packed
    if packed is None or batch.num_examples < 2:
        return Proof(
            name=NAME,
            passed=None,
            summary="Not tested: the micro-batch holds one example, which has nobody to leak into."
            if packed is not None
            else "Not tested: examples are padded, each in a row of its own.",
        )
    was_training = model.training
    model.eval()
    try:
        others, first, noise = _measure(model, batch, packed)
    finally:
        model.train(was_training)
    base = base_of(model) if isinstance(model, PeftModel) else model
    tolerance = max(_LEAST, torch.finfo(base.dtype).eps, _SLACK * noise)
    return Proof(
        name=NAME,
        passed=others <= tolerance < first,
        summary=_sentence(batch.num_examples, others, first, tolerance),
        details={
            "examples": batch.num_examples,
            "tokens": int(packed.bounds[-1]),
            "moved_others": others,
            "moved_first": first,
            "noise": noise,
            "tolerance": tolerance,
        },
    )


def _sentence(num_examples: int, others: float, first: float, tolerance: float) -> str:
    row = f"{num_examples} examples in one row"
    rest = "the others" if num_examples > 2 else "the other"
    if others > tolerance:
        return (
            f"{row} see each other: changing the first one changed {rest} by up to {others:.2g} "
            f"of their size, and rounding explains up to {tolerance:.2g}."
        )
    if first <= tolerance:
        return (
            f"Nothing is shown: changing the first of {row} changed its own outputs by only "
            f"{first:.2g} of their size, which rounding explains."
        )
    return (
        f"{row} do not see each other: changing the first one changed {rest} by {others:.2g} "
        f"(rounding: up to {tolerance:.2g}) and itself by {first:.1%}."
    )


def _measure(
    model: PeftModel | PreTrainedModel, batch: MicroBatch, packed: Packed
) -> tuple[float, float, float]:
    """Return how far the others moved, how far the first did, and what rounding does."""
    base = base_of(model) if isinstance(model, PeftModel) else model
    vocabulary = int(base.config.vocab_size)
    bounds = packed.bounds.tolist()
    length, total = bounds[1], bounds[-1]
    changed_1T = batch.tokens.clone()
    changed_1T[:, :length] = _other_tokens(batch.tokens[:, :length], vocabulary)
    before_TD = _outputs(model, batch.tokens, bounds)
    again_TD = _outputs(model, batch.tokens, bounds)
    after_TD = _outputs(model, changed_1T, bounds)
    # The same documents, the first one last.
    turned = [0, *(bound - length for bound in bounds[2:]), total]
    places = torch.arange(total, device=batch.tokens.device).roll(-length)
    behind_TD = _outputs(model, batch.tokens[:, places], turned)
    behind_changed_TD = _outputs(model, changed_1T[:, places], turned)
    noise = max(
        _moved(before_TD[length:], again_TD[length:]),
        _moved(behind_TD[: total - length], behind_changed_TD[: total - length]),
    )
    others = _moved(before_TD[length:], after_TD[length:])
    return others, _moved(before_TD[:length], after_TD[:length]), noise


def _other_tokens(tokens_1T: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return another token at each place, the same ones each time."""
    source = torch.Generator().manual_seed(_SEED)
    shift_1T = torch.randint(1, vocabulary, tokens_1T.shape, generator=source)
    return (tokens_1T + shift_1T.to(tokens_1T.device)) % vocabulary


def _outputs(
    model: PeftModel | PreTrainedModel, tokens_1T: torch.Tensor, bounds: list[int]
) -> torch.Tensor:
    """Return what the head would read of each token, (T, D), float32."""
    base = base_of(model) if isinstance(model, PeftModel) else model
    lengths = torch.tensor(bounds).diff()
    row = MicroBatch(
        tokens=tokens_1T,
        labels=tokens_1T,
        mask=None,
        packed=Packed(
            bounds=torch.tensor(bounds, dtype=torch.int32),
            positions=torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
            documents=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[
                None
            ],
            longest=int(lengths.max()),
        ),
    ).to(tokens_1T.device)
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    found: torch.Tensor = decoder(**row.inputs(), use_cache=False).last_hidden_state[0]
    return found.float()


def _moved(before_TD: torch.Tensor, after_TD: torch.Tensor) -> float:
    """Return how far the token that moved most did, as a share of its own size."""
    distance_T = (after_TD - before_TD).norm(dim=-1)
    return float((distance_T / before_TD.norm(dim=-1).clamp_min(1e-12)).max())
