"""The loss against plain cross-entropy, whole and split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from studio.domain.conversation import Conversation
from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import TargetGroup
from studio.tokens.examples import Example
from tests.workers.engine.conftest import MakeExamples
from workers.engine.batches import IGNORED, count_supervised, micro_batches
from workers.engine.lora import add_adapter, base_of
from workers.engine.loss import CHUNK_TOKENS, supervised_loss
from workers.engine.model import load_base


def reference(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden)[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)


def test_loss_and_gradients_are_those_of_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, CHUNK_TOKENS, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, CHUNK_TOKENS))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    head = nn.Linear(16, 50, bias=False).double()
    count = int((labels[:, 1:] != IGNORED).sum())
    assert count > 2 * CHUNK_TOKENS - CHUNK_TOKENS // 2
    supervised_loss(hidden, labels, head, num_supervised=count).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    ours, hidden.grad = hidden.grad, None
    reference(hidden, labels, head).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        supervised_loss(hidden, labels, head, num_supervised=count),
        reference(hidden, labels, head).float(),
    )


def test_nothing_supervised_is_zero() -> None:
    hidden, labels = torch.randn(1, 4, 8), torch.full((1, 4), IGNORED)
    assert float(supervised_loss(hidden, labels, nn.Linear(8, 8), num_supervised=1)) == 0


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe", "qwen3-next"])
def test_every_split_into_micro_batches_gives_the_same_loss_and_gradient(
    family: str,
    bases: dict[str, Path],
    conversations: list[Conversation],
    make_examples: MakeExamples,
) -> None:
    examples = list(make_examples(conversations[:4], family))[:4]
    torch.manual_seed(0)
    lora = LoraSpec(rank=4, targets=(TargetGroup.ATTENTION, TargetGroup.DELTA_NET))
    model = add_adapter(load_base(bases[family], method="qlora"), lora)
    whole = loss_and_gradient(model, examples, 4)
    for size in (1, 2, 3):
        part = loss_and_gradient(model, examples, size)
        assert part[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(part[1], whole[1], rtol=1e-3, atol=1e-6)


def loss_and_gradient(
    model: PeftModel, examples: list[Example], size: int
) -> tuple[float, torch.Tensor]:
    base: Any = base_of(model)
    count = count_supervised(examples)
    model.zero_grad()
    total = 0.0
    for batch in micro_batches(examples, size, 0):
        output = base(batch.tokens, attention_mask=batch.mask, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        share = supervised_loss(
            hidden, batch.labels, base.get_output_embeddings(), num_supervised=count
        )
        share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)
