"""Recomputed layers: the same losses and gradients, and exactly the planned layers run twice."""

from collections.abc import Collection

import pytest
import torch
from peft import PeftModel

import workers.engine.experts  # noqa: F401  # registers the experts function
from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import select, target_modules
from studio.errors import EngineError
from tests.workers.engine.small_models import CONFIGS, config_of, small_model
from workers.engine.batches import MicroBatch
from workers.engine.lora import add_adapter
from workers.engine.loss import batch_loss
from workers.engine.recompute import apply_recompute, decoder_layers, measured_layers

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_LAYERS = 4


def adapted(family: str) -> PeftModel:
    modules = target_modules(config_of(family))
    linear = {m.group for m in modules if m.kind == "linear" and m.layer is not None}
    model = add_adapter(small_model(family), LoraSpec(rank=4, targets=tuple(linear)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert select(modules, linear)
    return model.train()


def batch(num_tokens: int = 48) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 512, (2, num_tokens), generator=generator)
    return MicroBatch(tokens=tokens, labels=tokens.clone(), mask=torch.ones_like(tokens))


def one_pass(
    model: PeftModel, layers: Collection[int]
) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Return loss, gradients, and how often each layer's mixer ran."""
    apply_recompute(model, layers)
    runs = [0] * NUM_LAYERS
    handles = []
    for number, layer in enumerate(decoder_layers(model)):

        def count(*_: object, number: int = number) -> None:
            runs[number] += 1

        handles.append(layer.get_submodule("mlp").register_forward_pre_hook(count))
    model.zero_grad(set_to_none=True)
    loss = batch_loss(model, batch(), 94)
    loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, runs


@pytest.mark.parametrize("family", CONFIGS)
def test_recomputing_all_some_or_none_gives_the_same_loss_and_gradients(family: str) -> None:
    model = adapted(family)
    loss, gradients, runs = one_pass(model, ())
    assert runs == [1, 1, 1, 1]
    assert gradients
    for layers in ((0, 1, 2, 3), (0, 2), (3,)):
        other, others, runs = one_pass(model, layers)
        assert other == loss
        assert others.keys() == gradients.keys()
        assert all(torch.equal(others[name], gradients[name]) for name in gradients)
        assert runs == [1 + (number in layers) for number in range(NUM_LAYERS)]


def test_what_is_set_is_read_back_and_can_be_changed() -> None:
    model = adapted("qwen3")
    assert measured_layers(model) == []
    for layers in ([1, 3], [0], []):
        apply_recompute(model, layers)
        assert measured_layers(model) == layers


def test_nothing_is_recomputed_in_evaluation_mode() -> None:
    model = adapted("qwen3").eval()
    _, _, runs = one_pass(model, range(NUM_LAYERS))
    assert runs == [1, 1, 1, 1]


def test_the_embeddings_get_no_gradient_for_it() -> None:
    model = adapted("qwen3")
    apply_recompute(model, [0])
    seen = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, _a, out: seen.append(out.requires_grad))
    batch_loss(model, batch(), 94)
    assert seen == [False]


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match="Layer 4 cannot be recomputed: the model has 4 layers"):
        apply_recompute(adapted("qwen3"), [1, 4])
