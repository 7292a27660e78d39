"""What an Adapter means by PEFT's own reading: names, nesting, layout, rank and scale.

The Certificate of a Merge compares with this, so nothing of workers/adapter.py is used here: PEFT
wraps the real text class, whose weights take no memory, and says which parameter each saved
tensor belongs to.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from studio.errors import EngineError
from workers.shards import open_shard

_NAME = "default"
_PEFT_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """The change of one parameter: scale * left[e] @ right[e], for each expert e.

    Attributes:
        path: Name of the parameter in the text model.
        left: (experts, out, rank); a matrix counts as one expert.
        right: (experts, rank, in).
        dora: PEFT's layer that holds the magnitudes of DoRA, or None.
    """

    path: str
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    dora: Any = None

    def change(self, expert: int, rows: slice, before: torch.Tensor) -> torch.Tensor:
        """Return what is added to some rows of one matrix, (rows, in), float32.

        Args:
            expert: Whose matrix; 0 for a matrix by itself.
            rows: Which rows.
            before: The same rows of the base, float32.
        """
        change = self.scale * (self.left[expert, rows].float() @ self.right[expert].float())
        if self.dora is None:
            return change
        length = self.dora.get_weight_norm(before, change, scaling=1)
        factor = (self.dora.weight[rows].float() / length).unsqueeze(1)
        scaled: torch.Tensor = factor * (before + change) - before
        return scaled


@torch.no_grad()
def meanings(adapter: Path, base: Path) -> Iterator[Meaning]:
    """Yield the change of each parameter that an Adapter holds.

    Args:
        adapter: Folder in PEFT's layout.
        base: Folder of the base; only its configuration is read.

    Raises:
        EngineError: PEFT does not place every tensor of the Adapter, or lacks one.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    model = _skeleton(base)
    with warnings.catch_warnings():
        # PEFT 0.21.2 says so of every pattern for a targeted parameter, and follows it all the same
        # (tuners_utils.py, inject_adapter: only the names of modules are looked at).
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
        inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=True)
    with open_shard(adapter / _WEIGHTS) as file:
        tensors = {_inside(key): file.get_tensor(key) for key in file.keys()}
    _refuse_unread(adapter, model, tensors)
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield _meaning(path.replace(".base_layer", ""), layer)


def _skeleton(base: Path) -> nn.Module:
    """Return the text model without values.

    Its parts hang under a plain module: from a transformers model, PEFT 0.21.2 reads targets that
    end in gate_proj, up_proj or down_proj as routed experts, also those of a shared expert
    (https://github.com/huggingface/peft/issues/3711).
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    model = nn.Module()
    for name, child in text.named_children():
        model.add_module(name, child)
    return model


def _inside(key: str) -> str:
    """Return the name of a saved tensor inside the wrapped model: with the Adapter's name."""
    name = key.removeprefix(_PEFT_PREFIX)
    if name.endswith(("lora_A.weight", "lora_B.weight")):
        return f"{name.removesuffix('weight')}{_NAME}.weight"
    if name.endswith("lora_magnitude_vector"):
        return f"{name}.{_NAME}.weight"
    return f"{name}.{_NAME}" if ".lora_embedding_" in name else name


def _refuse_unread(adapter: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put the saved tensors into the wrapped model, and refuse what is left over or missing."""
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise EngineError(
            f"PEFT reads other shapes from the Adapter in {adapter}: {str(error).splitlines()[-1]}.",
            "Use an Adapter that was trained on this base model.",
        ) from error
    lacking = [key for key in result.missing_keys if ".lora_" in key]
    if result.unexpected_keys or lacking:
        odd = sorted([*result.unexpected_keys, *lacking])
        raise EngineError(
            f"PEFT reads the Adapter in {adapter} otherwise: {odd[0]} is without a counterpart.",
            "Use an Adapter that was trained on this base model.",
        )


def _meaning(module: str, layer: LoraLayer) -> Meaning:
    scale = float(layer.scaling[_NAME])
    if isinstance(layer, ParamWrapper):
        path = f"{module}.{layer.parameter_name}"
        if layer.get_param().dim() == 3:  # type: ignore[no-untyped-call]
            factors = layer.get_delta_factors(_NAME)  # type: ignore[no-untyped-call]
            left, right, scale = factors
            return Meaning(path=path, left=left, right=right, scale=scale)
    elif isinstance(layer, Embedding):
        left, right = layer.lora_embedding_A[_NAME].T, layer.lora_embedding_B[_NAME].T
        return Meaning(
            path=f"{module}.weight", left=left.unsqueeze(0), right=right.unsqueeze(0), scale=scale
        )
    elif isinstance(layer, Linear):
        path = f"{module}.weight"
    else:
        raise EngineError(
            f"PEFT makes a {type(layer).__name__} of {module}.",
            "This is a fault of the studio or of this version of PEFT; see log.txt.",
        )
    inner: Any = layer
    left, right = inner.lora_B[_NAME].weight, inner.lora_A[_NAME].weight
    magnitudes = inner.lora_magnitude_vector
    dora = magnitudes[_NAME] if _NAME in magnitudes else None
    return Meaning(
        path=path, left=left.unsqueeze(0), right=right.unsqueeze(0), scale=scale, dora=dora
    )
