"""FSDP2: weights, gradients and optimizer state shared out among the ranks, layer by layer.

torch's own `fully_shard` (https://docs.pytorch.org/docs/2.13/distributed.fsdp.fully_shard.html) on
the process group that Accelerate opened, not Accelerate's `prepare`, for three reasons, all of
accelerate 1.15: on a CPU it wraps with DDP without a word, so nothing of it could be tested without
GPUs; it makes [norm, lm_head] one unit, whose hooks expect one call each, while the loss calls the
head once per chunk and once more in the backward pass; and it averages over ranks, while the loss
is a sum that is normalised by the tokens of all of them.

Not covered: shards kept in the machine's memory, tensor and context parallelism.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from studio.domain.spec import OptimSpec
from studio.errors import EngineError
from workers.engine.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")


class Root(nn.Module):
    """Runs functions of a model with all that stands outside its decoder layers gathered.

    It is the root of FSDP2: norm, head and embeddings are gathered when a call begins and, when
    there is a gradient, stay until the backward pass has ended. So a loss may call the head, or
    read its weight, as often as it likes.

    Args:
        model: The model that trains; its own names stay what they are.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return `act(model, ...)`; all ranks call it equally often, with like functions."""
        return act(self.model, *args, **kwargs)


def wrap(
    model: PreTrainedModel | PeftModel,
    world: World,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Root:
    """Share a model out among the ranks, in place. Build the optimizer afterwards.

    Each decoder layer is a unit, all else is one more. 4-bit weights are shared out when they are
    stored in a float dtype (`bnb_4bit_quant_storage`; bytes cannot be: FSDP2 makes parameters of
    its shards, and those of integers may not exist as trainable ones even for a moment);
    otherwise each rank keeps all of them. With several machines a model is whole on each of them
    (HSDP): gradients alone travel between machines.

    Args:
        model: Weights on any device; the same on every rank.
        world: One process shares nothing out, unless `compute_dtype` is given.
        compute_dtype: None computes in the dtype of the weights. Otherwise weights are float32
            and gathered in this dtype, and gradients are summed in float32 (full fine-tuning on
            GPUs). 4-bit weights do not survive that cast unless they are stored in this dtype.

    Returns:
        What losses, evaluation and samples are called through, as in
        `wrap(model, world)(batch_loss, batch, num_supervised)`. The model inside is the one given.
    """
    root = Root(model)
    if world.size == 1 and compute_dtype is None:
        return root
    bytes_kept = {p for p in model.parameters() if not p.is_floating_point()}
    if bytes_kept:
        log.warning(
            "%d packed 4-bit weights are stored as bytes, so every rank keeps all of them; load "
            "them with a float storage dtype to share them out.",
            len(bytes_kept),
        )
    options: dict[str, Any] = {
        "mesh": _mesh(world),
        "ignored_params": bytes_kept,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32 if compute_dtype is not None else None,
        ),
    }
    for layer in _decoder_layers(model):
        if compute_dtype is not None:
            layer.float()
        # fully_shard moves one unit at a time to the GPU, so the whole is never there.
        fully_shard(layer, **options)
    if compute_dtype is not None:
        _float_outside_layers(model)
    fully_shard(root, **options, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # A sum, not a mean. PREMUL_SUM, which torch would take, is unknown to gloo.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # An expert that no token of a rank chose has no gradient there, but elsewhere.
            module.set_reduce_scatter_unused_params(True)
    return root


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm over all ranks, and return the norm before.

    Args:
        parameters: Those that train, whole or shared out.
        max_norm: Largest norm that is left as it is.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return float(whole_tensor(norm))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is shared out as one that is not; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_optimizer(optim: OptimSpec, world: World) -> None:
    """Refuse optimizers that cannot step what is shared out.

    Raises:
        EngineError: A bitsandbytes optimizer on more than one rank.
    """
    if world.size > 1 and optim.optimizer != "adamw":
        # bitsandbytes 0.50: "optimizer_update_8bit_blockwise got mixed torch.Tensor and DTensor"
        raise EngineError(
            f"The optimizer {optim.optimizer} works on one GPU only: bitsandbytes cannot step "
            f"weights that are shared out among {world.size} of them.",
            "Choose adamw; its state is shared out among the GPUs as well.",
            "optim.optimizer",
        )


def _mesh(world: World) -> DeviceMesh:
    kind = world.device.type
    if not dist.is_initialized():
        # One process that no torchrun started: a group of itself, for the cast of `compute_dtype`.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=0, world_size=1)
    if world.num_nodes == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    per_node = world.size // world.num_nodes
    return init_device_mesh(
        kind, (world.num_nodes, per_node), mesh_dim_names=("replicate", "shard")
    )


def _decoder_layers(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    layers = base.get_decoder().layers  # type: ignore[no-untyped-call]
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def _float_outside_layers(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor) and parameter.is_floating_point():
            parameter.data = parameter.data.float()
