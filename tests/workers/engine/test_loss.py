"""The loss against plain cross-entropy, whole and split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import TargetGroup
from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.examples import Example
from studio.tokens.order import Order
from tests.workers.engine.families import documents, tiny, with_lora
from workers.engine import loss
from workers.engine.batches import IGNORED, collate, count_supervised
from workers.engine.lora import add_adapter, base_of
from workers.engine.loss import CHUNK_TOKENS, batch_loss, supervised_loss
from workers.engine.model import load_base
from workers.engine.varlen import enable_packing


def reference(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden)[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("is_trained", [True, False])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(is_trained: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, CHUNK_TOKENS, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, CHUNK_TOKENS))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    head = nn.Linear(16, 50, bias=False).double().requires_grad_(is_trained)
    count = int((labels[:, 1:] != IGNORED).sum())
    assert count > 2 * CHUNK_TOKENS
    supervised_loss(hidden, labels, head, num_supervised=count).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    ours, hidden.grad = (hidden.grad, head.weight.grad), None
    head.weight.grad = None
    reference(hidden, labels, head).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-5, atol=1e-9)
    assert (ours[1] is not None) is is_trained
    if is_trained:
        torch.testing.assert_close(ours[1], head.weight.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        supervised_loss(hidden, labels, head, num_supervised=count),
        reference(hidden, labels, head).float(),
    )


def test_the_gradient_is_that_of_the_backward_pass_not_of_the_forward_alone() -> None:
    hidden = torch.randn(1, 9, 16, requires_grad=True)
    labels, head = torch.randint(0, 50, (1, 9)), nn.Linear(16, 50, bias=False)
    head.requires_grad_(False)
    once = torch.autograd.grad(supervised_loss(hidden, labels, head, num_supervised=4), hidden)[0]
    thrice = 3 * supervised_loss(hidden, labels, head, num_supervised=4)
    torch.testing.assert_close(torch.autograd.grad(thrice, hidden)[0], 3 * once)


def test_sixteen_bits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 700, 32, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 500, (1, 700))
    head = nn.Linear(32, 500, bias=False).bfloat16().requires_grad_(False)
    share = supervised_loss(hidden, labels, head, num_supervised=699)
    share.backward()  # type: ignore[no-untyped-call]
    assert share.dtype == torch.float32
    precise, whole = hidden.detach().float().requires_grad_(), head.float()
    wanted = reference(precise, labels, whole)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(share, wanted, rtol=1e-3, atol=0)
    assert hidden.grad is not None
    assert precise.grad is not None
    assert float((hidden.grad.float() - precise.grad).norm() / precise.grad.norm()) < 0.01


def test_a_head_with_a_lora_is_trained_through_it() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 50, bias=False))
    wrapped: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    head: Any = wrapped.base_model.model[0]
    hidden, labels = torch.randn(2, 600, 16), torch.randint(0, 50, (2, 600))
    found = supervised_loss(hidden, labels, head, num_supervised=2 * 599)
    found.backward()  # type: ignore[no-untyped-call]
    ours = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
    wrapped.zero_grad()
    wanted = reference(hidden, labels, head)
    wanted.backward()  # type: ignore[no-untyped-call]
    theirs = [p.grad for p in wrapped.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) == 2
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(  # noqa: D105
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                self.seen.append((str(function), tuple(each.shape)))
        return found


def widest(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> tuple[int, int]:
    """Most rows of a tensor of vocabulary width, forward and backward; products with the head."""
    with Shapes() as shapes:
        supervised_loss(hidden, labels, head, num_supervised=100).backward()  # type: ignore[no-untyped-call]
    logits = [shape[-2] for _, shape in shapes.seen if len(shape) > 1 and shape[-1] == 1000]
    products = sum("mm" in name for name, _ in shapes.seen)
    return max(logits), products


def test_logits_are_never_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)
    hidden = torch.randn(2, 256, 16, requires_grad=True)
    labels = torch.randint(0, 1000, (2, 256))
    labels[:, ::2] = IGNORED
    head = nn.Linear(16, 1000, bias=False)
    # 256 supervised tokens: 4 chunks, each twice through the trained head, and two gradients.
    assert widest(hidden, labels, head) == (64, 4 * 4)
    # Frozen: once forward, once for the gradient, and nothing of the shape of the head.
    assert widest(hidden, labels, head.requires_grad_(False)) == (64, 4 * 2)
    # The probe sees a plain cross-entropy for what it is.
    with Shapes() as shapes:
        reference(hidden, labels, head)
    assert max(np.prod(shape) for _, shape in shapes.seen) == 2 * 256 * 1000


@pytest.mark.parametrize("is_trained", [True, False])
def test_nothing_supervised_is_zero_and_can_be_propagated(is_trained: bool) -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    labels, head = torch.full((1, 4), IGNORED), nn.Linear(8, 8, bias=False)
    share = supervised_loss(hidden, labels, head.requires_grad_(is_trained), num_supervised=1)
    share.backward()  # type: ignore[no-untyped-call]
    assert float(share.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_accumulation_and_ranks_give_the_same_step(packing: bool) -> None:
    """The same examples, cut in six ways: one number, one gradient."""
    lengths = np.random.default_rng(0).integers(5, 60, 24)
    examples = documents(lengths.tolist())
    model = with_lora(tiny("qwen3_next"))
    enable_packing(model)
    count = count_supervised(examples)
    found = []
    # Micro-batch, accumulation, ranks.
    for size, steps, ranks in ((24, 1, 1), (8, 3, 1), (4, 6, 1), (4, 3, 2), (2, 4, 3), (1, 6, 4)):
        batch = BatchSpec(micro_batch_size=size, gradient_accumulation_steps=steps, packing=packing)
        train = TrainSpec(num_gpus=ranks)
        order = Order(lengths, batch, train, max_length_tokens=64)
        # Packed rows hold what fits, so steps differ; an epoch's rows are one big step here.
        rows: list[tuple[int, ...]] = []
        for step in order.steps():
            assert len(step) == steps * ranks
            rows += step
        rows = until_all_were_seen(rows, len(examples))
        total, gradients = 0.0, torch.zeros(())
        for rank in range(ranks):
            model.zero_grad()
            for row in rows[rank::ranks]:
                micro_batch = collate([examples[index] for index in row], 0, packed=packing)
                share = batch_loss(model, micro_batch, count)
                share.backward()  # type: ignore[no-untyped-call]
                total += float(share.detach())
            mine = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients = gradients + torch.cat(mine)
        found.append((total, gradients))
    for total, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        assert float((gradients - found[0][1]).norm() / found[0][1].norm()) < 1e-5


def until_all_were_seen(rows: list[tuple[int, ...]], num_examples: int) -> list[tuple[int, ...]]:
    """The rows of the first epoch: the last step goes on into the next one."""
    seen: list[int] = []
    for number, row in enumerate(rows, 1):
        seen += row
        if len(seen) == num_examples:
            assert sorted(seen) == list(range(num_examples))
            return rows[:number]
    raise AssertionError("an epoch does not end with a micro-batch")


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe", "qwen3-next"])
def test_every_split_into_micro_batches_gives_the_same_loss_and_gradient(
    family: str, bases: dict[str, Path]
) -> None:
    """On the bases that runs have, in 4 bits."""
    examples = documents((90, 40, 61, 120))
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
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], 0, packed=False)
        output = base(batch.tokens, attention_mask=batch.mask, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        share = supervised_loss(
            hidden, batch.labels, base.get_output_embeddings(), num_supervised=count
        )
        share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)
