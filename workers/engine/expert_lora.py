"""LoRA on routed experts: PEFT's layer, with the product of workers.engine.experts.

Names, parameters, their layout, start, saving, loading and merging are PEFT's. What PEFT 0.21.2
does in forward is not used: it folds the update into a copy of all experts, which rounds it away in
bfloat16, makes their whole gradient, and does not work on 4-bit weights (cached parametrisations,
https://github.com/huggingface/peft/issues/3711 and the code around `ParamWrapper`).
"""

from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn
from transformers import PreTrainedModel

from studio.domain.targets import TargetModule
from studio.errors import EngineError
from workers.engine.experts import IMPLEMENTATION, LowRank
from workers.engine.quantize import nf4_states


class ParamWrapper(PeftParamWrapper):
    """A LoRA on one projection of all experts of a layer; two of them stand in each other.

    The class is called as PEFT's is: PEFT knows wrappers that may stand in each other by that name
    (peft/tuners/tuners_utils.py, `_inject_parameters`).
    """

    def low_rank(self) -> LowRank | None:
        """Return the LoRA that is switched on, if any.

        Raises:
            EngineError: More than one is.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        if len(names) > 1:
            raise EngineError(
                f"The adapters {', '.join(names)} are on at once on routed experts.",
                "Switch on one at a time.",
            )
        (name,) = names
        a, b = self.lora_A[name], self.lora_B[name]
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        return LowRank(a=a.weight, b=b.weight, scaling=float(self.scaling[name]))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand the LoRA down to `studio_experts`; the other arguments are its own."""
        self._check_forward_args(x, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.disable_adapters and self.merged:
            self.unmerge()
        low = self.low_rank()
        if low is not None:
            kwargs["adapters"] = {**kwargs.get("adapters", {}), self.parameter_name: low}
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to plain weights; see PEFT's `ParamWrapper.merge`.

        Raises:
            EngineError: The weights are in 4 bits.
        """
        if self.parameter_name in nf4_states(self.get_base_layer()):
            raise EngineError(
                "An Adapter cannot be merged into experts in 4 bits.",
                "Merge it into the published weights.",
            )
        super().merge(safe_merge, adapter_names)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT asks the parameter, which may be packed.
        state = nf4_states(self.get_base_layer()).get(self.parameter_name)
        self.num_experts, rows, columns = (self._weight() if state is None else state).shape
        self._param_ndim = 3
        return rows, columns  # PEFT itself swaps them

    def _weight(self) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT also casts to the dtype of the parameter, which may be that of packed bytes.
        target = device or self._weight().device
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and factors[adapter_name].weight.device.type != "meta":
                factors[adapter_name].to(target)


def use_own_experts(
    model: PreTrainedModel, config: LoraConfig, experts: list[TargetModule]
) -> None:
    """Have PEFT wrap routed experts with `ParamWrapper` of this file, by its own extension point.

    Args:
        model: A base; it is switched to the experts function "studio".
        config: Of the adapter that is about to be added.
        experts: The projections that get a LoRA; nothing is done without any.
    """
    if not experts:
        return
    modules = {type(model.get_submodule(m.full_name.rpartition(".")[0])) for m in experts}
    # https://huggingface.co/docs/peft/developer_guides/custom_models
    config._register_custom_module(dict.fromkeys(modules, ParamWrapper))  # noqa: SLF001
    model.set_experts_implementation(IMPLEMENTATION)
