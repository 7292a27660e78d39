"""A base model of a published shape with random weights, loaded onto the device without a checkpoint.

transformers' own loader and the engine's own quantiser read it, from tensors that are drawn on the
device when they are asked for: memory holds the quantised weights and one tensor in 16 bits, and
neither disk nor the machine's memory holds anything. Random weights are honest for speed, with two
exceptions: routing is balanced, and a loss means nothing beyond ln of the vocabulary.
"""

import math
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from studio.domain.architecture import Architecture, read_architecture
from studio.domain.shapes import tensor_shapes
from workers.engine.experts import IMPLEMENTATION
from workers.engine.quantizer import Nf4Config

_STD = 0.02  # initializer_range of the published configurations
# Of the steps of a delta net, as Mamba-2 draws them.
_DT_RANGE = (0.001, 0.1)


class RandomWeight:
    """A tensor that is drawn when the loader reads it, as it would slice one in a file.

    Args:
        shape: Of the tensor.
        mean: Of its numbers.
        std: Of its numbers.
        device: Where it is drawn.
        seed: Its own, so that the order of reading does not matter.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        mean: float,
        std: float,
        device: torch.device,
        seed: int,
    ) -> None:
        self._shape, self._mean, self._std = shape, mean, std
        self._device, self._seed = device, seed

    def __getitem__(self, _everything: object) -> torch.Tensor:
        """Draw the whole tensor."""
        generator = torch.Generator(self._device).manual_seed(self._seed)
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        drawn = torch.empty(self._shape, dtype=dtype, device=self._device)
        return drawn.normal_(self._mean, self._std, generator=generator)


def random_weights(architecture: Architecture, device: torch.device) -> dict[str, RandomWeight]:
    """Return every tensor of a text model, by its name in transformers."""
    found = {}
    for seed, (name, shape) in enumerate(tensor_shapes(architecture).items()):
        mean, std = _distribution(architecture, name)
        found[name] = RandomWeight(shape, mean=mean, std=std, device=device, seed=seed)
    return found


def _distribution(architecture: Architecture, name: str) -> tuple[float, float]:
    """Return mean and standard deviation, so that nothing explodes and states live for a while."""
    if name.endswith(".A_log"):
        return 0.0, 0.1
    if name.endswith(".dt_bias"):
        # The inverse of softplus at the middle of the range, in its logarithm.
        middle = math.exp(sum(map(math.log, _DT_RANGE)) / 2)
        return math.log(math.expm1(middle)), 0.5
    if name.endswith(".conv1d.weight"):
        return 0.0, 0.5
    if name.endswith("norm.weight"):
        # Those of the families with an output gate are stored as distance from 1, but for the
        # gated norm of the delta net.
        is_centred = architecture.has_output_gate and "linear_attn" not in name
        return (0.0 if is_centred else 1.0), 0.02
    return 0.0, _STD


def build_base(config: dict[str, Any], method: str, device: torch.device) -> PreTrainedModel:
    """Return a frozen base as `workers.engine.model.load_base` would, but random.

    Args:
        config: The text part of a config.json.
        method: qlora or lora.
        device: Where the weights live.
    """
    architecture = read_architecture(config)
    values = dict(config)
    loaded = AutoConfig.for_model(values.pop("model_type"), **values)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(loaded)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    experts = {"experts_implementation": IMPLEMENTATION} if architecture.experts else {}
    model: PreTrainedModel = kind.from_pretrained(
        None,
        config=loaded,
        state_dict=random_weights(architecture, device),
        dtype=dtype,
        device_map={"": device},
        quantization_config=Nf4Config(dtype, torch.uint8) if method == "qlora" else None,
        **experts,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # see workers.engine.model.load_base
    model.requires_grad_(False)
    model.train(False)
    return model
