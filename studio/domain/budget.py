"""The memory budget of a run: what each card must hold, and which layers are recomputed for it.

Predicted from config.json and JobSpec before any GPU memory is taken; memory_state.py and
memory_activations.py hold the formulas with their sources. A backward pass is walked from the loss
to the first layer, and the moment that holds most is the budget.
Not covered: memory of other processes on a card, what loading needs beside the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from studio.domain.architecture import Architecture, read_architecture
from studio.domain.memory_activations import (
    Pass,
    boundary_bytes,
    kept_bytes,
    loss_bytes,
    outside_bytes,
    passing_bytes,
)
from studio.domain.memory_state import State, held_state, resolved
from studio.domain.spec import JobSpec
from studio.domain.targets import TargetGroup, TargetModule, selected

GIB = 2**30
# Kernels that CUDA loads with the first use: https://huggingface.co/docs/transformers/model_memory_anatomy
# (1,343 MB, read off nvidia-smi there).
CONTEXT_BYTES = 1_343_000_000
# What PyTorch's allocator reserves and cannot use between blocks. A judgement, not a measurement:
# nothing published gives a share.
SLACK = 0.05
PART_TITLES = {
    "weights": "Weights",
    "adapter": "Adapter",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Kept activations",
    "layer": "One layer at work",
    "loss": "Loss",
    "workspace": "Dequantised weights",
    "gathered": "Gathered from other cards",
    "context": "CUDA and allocator",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One bar of a Budget.

    Attributes:
        name: One of PART_TITLES.
        num_bytes: On each card, at the moment that holds most.
    """

    name: str
    num_bytes: int

    @property
    def title(self) -> str:
        """The name as people read it."""
        return PART_TITLES[self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What each card holds when it holds most.

    Attributes:
        method: qlora, lora or full; never auto.
        cards: That share a model; 0 is the CPU.
        tokens: Of a micro-batch.
        num_layers: Of the model.
        recomputed: Layers whose activations are computed twice, in order.
        moment: The worst one: `loss`, or `layer N` in the backward pass.
        parts: In the order of PART_TITLES, without empty ones.
    """

    method: str
    cards: int
    tokens: int
    num_layers: int
    recomputed: tuple[int, ...]
    moment: str
    parts: tuple[Part, ...]

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def fits(self, card_bytes: int) -> bool:
        """Tell whether a card of that memory holds it."""
        return self.total_bytes <= card_bytes

    @property
    def plan(self) -> str:
        """What is recomputed, in words."""
        count = len(self.recomputed)
        if count == 0:
            return f"none of {self.num_layers} layers recomputed"
        if count == self.num_layers:
            return f"all {count} layers recomputed"
        return f"{count} of {self.num_layers} layers recomputed"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layers:
    """Bytes of every layer, on each card.

    Attributes:
        kept: When it is not recomputed.
        boundary: When it is: its input.
        passing: In its own backward pass, beside what it keeps.
        workspace: Its largest weight in the compute dtype.
    """

    kept: Sequence[int]
    boundary: int
    passing: Sequence[int]
    workspace: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a run asks of each card, for any choice of recomputed layers.

    Attributes:
        run: One pass over a micro-batch.
        state: What is held from the first to the last step.
        layers: What each layer adds.
        outside: Activations beside the layers.
        loss: What a chunk of the loss needs.
    """

    method: str
    cards: int
    run: Pass
    state: State
    layers: _Layers
    outside: int
    loss: int

    def budget(self, num_kept: int) -> Budget:
        """Return the Budget when the last `num_kept` layers keep their activations.

        The last ones: the backward pass begins with them, so what they keep is gone when the first
        recomputed layer is at work.
        """
        layers, num_layers = self.layers, len(self.layers.kept)
        num_recomputed = num_layers - num_kept
        held = [
            layers.boundary if number < num_recomputed else layers.kept[number]
            for number in range(num_layers)
        ]
        moments = [({"activations": sum(held) + self.outside, "loss": self.loss}, "loss")]
        for number, before in enumerate(accumulate([0, *held[:-1]])):
            again = layers.kept[number] if number < num_recomputed else 0
            moment = {
                "activations": before + held[number],
                "layer": again + layers.passing[number],
                "workspace": layers.workspace[number],
            }
            moments.append((moment, f"layer {number}"))
        worst, name = max(moments, key=lambda found: sum(found[0].values()))
        return Budget(
            method=self.method,
            cards=self.cards,
            tokens=self.run.tokens,
            num_layers=num_layers,
            recomputed=tuple(range(num_recomputed)),
            moment=name,
            parts=self._parts(worst),
        )

    def _parts(self, worst: Mapping[str, int]) -> tuple[Part, ...]:
        state = self.state
        values = {
            "weights": state.weights,
            "adapter": state.adapter,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "gathered": state.gathered,
            **worst,
        }
        if self.cards:
            values["context"] = CONTEXT_BYTES + round(SLACK * sum(worst.values()))
        return tuple(
            Part(name=name, num_bytes=values[name]) for name in PART_TITLES if values.get(name)
        )


def demand_of(config: Mapping[str, Any], spec: JobSpec, *, tokens: int | None = None) -> Demand:
    """Return what a run asks of each card.

    Args:
        config: A model's config.json, or the text part of one.
        spec: Its method is not auto.
        tokens: Of a micro-batch; by default as many as it may have.

    Raises:
        InputError: The model cannot be trained, or the targets do not fit it.
    """
    architecture = read_architecture(config)
    modules = [] if spec.method == "full" else selected(config, spec.lora)
    run = pass_of(spec, tokens)
    state = held_state(architecture, spec, modules)
    return Demand(
        method=resolved(spec),
        cards=spec.train.num_gpus,
        run=run,
        state=state,
        layers=_layers(architecture, spec, modules, run, state),
        outside=outside_bytes(architecture, run),
        loss=loss_bytes(architecture, run, is_head_trained=_trains_head(spec, modules)),
    )


def _trains_head(spec: JobSpec, modules: Sequence[TargetModule]) -> bool:
    return spec.method == "full" or any(m.group is TargetGroup.HEAD for m in modules)


def pass_of(spec: JobSpec, tokens: int | None = None) -> Pass:
    """Return one pass over the largest micro-batch that a spec allows."""
    is_gpu = spec.train.num_gpus > 0
    largest = spec.batch.micro_batch_size * spec.data.max_length_tokens
    return Pass(
        tokens=largest if tokens is None else tokens,
        rows=1 if spec.batch.packing else spec.batch.micro_batch_size,
        compute_bytes=2 if is_gpu else 4,
        is_fused=is_gpu,
        dropout=0.0 if spec.method == "full" else spec.lora.dropout,
        trains_all=spec.method == "full",
    )


def _layers(
    architecture: Architecture,
    spec: JobSpec,
    modules: Sequence[TargetModule],
    run: Pass,
    state: State,
) -> _Layers:
    ranks: list[dict[str, int]] = [{} for _ in architecture.layers]
    for module in modules:
        if module.layer is not None:
            ranks[module.layer][module.leaf] = module.lora_rank(spec.lora)
    numbers = range(len(ranks))
    return _Layers(
        kept=[kept_bytes(architecture, n, ranks[n], run) for n in numbers],
        boundary=boundary_bytes(architecture, run),
        passing=[passing_bytes(architecture, n, ranks[n], run) for n in numbers],
        workspace=state.workspace,
    )
