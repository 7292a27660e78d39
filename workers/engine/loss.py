"""Cross-entropy over supervised tokens only, without the logits of all the others.

The hidden states at supervised positions are gathered first and go through the head in chunks:
with 248,320 tokens of vocabulary the logits of one 2048-token example would be 2 GB in float32,
and three times that in a plain cross-entropy. Where the head is frozen, the gradient of the hidden
states is computed beside the loss, while the logits of a chunk are there: each chunk goes through
the head once, no logits are kept, and no gradient of the head is made. A head that is trained, or
carries a LoRA, computes its chunks again in the backward pass.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.engine.batches import IGNORED, MicroBatch
from workers.engine.lora import base_of

# B rows, T tokens, N supervised tokens, C tokens of a chunk, D hidden, V vocabulary
# At 248,320 tokens of vocabulary a chunk in float32 is 0.5 GB; 512 rows keep a matrix product
# busy (above 184 rows an H200 is bound by arithmetic, not by reading the head).
CHUNK_TOKENS = 512


def batch_loss(
    model: PeftModel | PreTrainedModel, batch: MicroBatch, num_supervised: int
) -> torch.Tensor:
    """Return the share of a micro-batch in the mean loss of `num_supervised` tokens.

    Args:
        model: Base and adapter, or a base alone. For a packed micro-batch
            workers.engine.varlen.enable_packing was called on it.
        batch: On the model's device.
        num_supervised: Supervised tokens of all micro-batches that are summed.
    """
    base = base_of(model) if isinstance(model, PeftModel) else model
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    output = decoder(**batch.inputs(), use_cache=False)
    return supervised_loss(
        output.last_hidden_state, batch.labels, head, num_supervised=max(1, num_supervised)
    )


def supervised_loss(
    hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: nn.Module, *, num_supervised: int
) -> torch.Tensor:
    """Return this micro-batch's share of the step's mean cross-entropy.

    Summed over the micro-batches of a step, those of all processes together, it is the mean over
    all supervised tokens of the step, however the step was split. (Averaging each micro-batch
    first weighs tokens of sparse ones more: https://unsloth.ai/blog/gradient.)

    Args:
        hidden_BTD: Output of the last norm; position t predicts token t + 1.
        labels_BT: Token where supervised, IGNORED elsewhere.
        head: Maps hidden states to logits over the vocabulary.
        num_supervised: Supervised tokens of the whole step, all micro-batches together.

    Returns:
        Scalar, float32, in nats.
    """
    targets_BT = labels_BT[:, 1:]
    is_supervised_BT = targets_BT != IGNORED
    hidden_ND = hidden_BTD[:, :-1][is_supervised_BT]
    targets_N = targets_BT[is_supervised_BT]
    if not len(targets_N):
        # Zero with a graph: the backward pass of a model that is shared among processes
        # exchanges tensors, and each of them must take part.
        return hidden_BTD.sum().float() * 0.0
    if _is_plain_frozen(head):
        total: torch.Tensor = _FrozenHead.apply(hidden_ND, targets_N, head.weight)  # type: ignore[no-untyped-call]
        return total / num_supervised
    total = hidden_BTD.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets_N), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(
            _chunk_sum, hidden_ND[rows], targets_N[rows], head, use_reentrant=False
        )
    return total / num_supervised


def _is_plain_frozen(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is x W^T and nothing else, with a W that is not trained.

    A LoRA wraps the layer in a class of its own, and a 4-bit layer has a forward of its own.
    """
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "bias" not in dict(head.named_parameters())
        and not head.weight.requires_grad
    )


class _FrozenHead(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head, and its gradient in the same pass.

    With p = softmax(h W^T) the gradient of -log p[target] by h is (p - onehot(target)) W.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weight_VD: torch.Tensor
    ) -> torch.Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_N), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            targets_C1 = targets_N[rows, None]
            logits_CV = _at_least_float32(F.linear(hidden_ND[rows], weight_VD))
            normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (normaliser_C1 - logits_CV.gather(1, targets_C1)).sum()
            if gradient_ND is not None:
                error_CV = logits_CV.sub_(normaliser_C1).exp_()
                error_CV.scatter_add_(1, targets_C1, torch.full_like(normaliser_C1, -1.0))
                gradient_ND[rows] = error_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0].to(gradient_ND.dtype), None, None


def _chunk_sum(hidden_CD: torch.Tensor, targets_C: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits_CV = _at_least_float32(head(hidden_CD))
    return F.cross_entropy(logits_CV, targets_C, reduction="sum").float()


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
