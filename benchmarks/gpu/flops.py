"""Floating-point operations of a step, counted from the shapes of a model: 2 for a multiply-add.

Linear layers and routed experts: 2 for each weight that a token meets. Attention: 2 L^2 x heads x
size for a document of L tokens, the causal half of both products. Gated DeltaNet in chunks of
C = 64: v heads x (6 d^2 + 8 C d) a token. Backward: as much as forward for frozen linear layers
(the gradient of their input alone) and 2.5 times it for attention and delta rule, which compute
parts again. The head: supervised tokens only, forward and gradient. A LoRA's own, 3 to 6 %, norms,
convolutions and the optimizer are left out, so what is said of a card's use is the lower bound.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from studio.domain.architecture import Architecture, Mixer
from studio.domain.memory_activations import DELTA_CHUNK
from studio.domain.shapes import tensor_shapes

_MIXER_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Flop:
    """Operations of one step.

    Attributes:
        model: What the mathematics asks for.
        executed: With the forward passes that recomputed layers take again.
    """

    model: float
    executed: float


def step_flop(
    architecture: Architecture,
    lengths: Sequence[int],
    num_supervised: int,
    recomputed: Collection[int],
) -> Flop:
    """Count a step with a frozen base.

    Args:
        architecture: What the model is made of.
        lengths: Of all documents of the step, in tokens.
        num_supervised: Tokens that go through the head.
        recomputed: Numbers of the layers that are computed again.
    """
    linear = linear_weights(architecture)
    tokens = sum(lengths)
    total = again = 0.0
    for number in range(len(architecture.layers)):
        products = 2 * linear[number] * tokens
        mixer = mixer_flop(architecture, number, lengths)
        total += 2 * products + (1 + _MIXER_BACKWARD) * mixer
        if number in recomputed:
            again += products + mixer
    total += 2 * 2 * architecture.vocabulary * architecture.hidden * num_supervised
    return Flop(model=total, executed=total + again)


def linear_weights(architecture: Architecture) -> list[float]:
    """Return the weights of linear layers that a token meets, by layer."""
    met = [0.0] * len(architecture.layers)
    for name, shape in tensor_shapes(architecture).items():
        parts = name.split(".")
        if parts[1] != "layers" or len(shape) < 2 or "conv1d" in name:
            continue
        share = 1.0
        if len(shape) == 3 and architecture.experts is not None:
            share = architecture.experts.top_k / architecture.experts.count
        met[int(parts[2])] += share * math.prod(shape)
    return met


def mixer_flop(architecture: Architecture, number: int, lengths: Sequence[int]) -> float:
    """Return what attention or delta rule of a layer take forward."""
    delta = architecture.delta_net
    if architecture.layers[number].mixer is Mixer.ATTENTION or delta is None:
        squares = sum(length**2 for length in lengths)
        return 2.0 * squares * architecture.num_heads * architecture.head_dim
    size = delta.key_dim
    each = 6 * size * delta.value_dim + 8 * DELTA_CHUNK * size
    return float(sum(lengths) * delta.num_value_heads * each)
