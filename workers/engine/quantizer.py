"""How weights get into 4 bits while a model loads, through transformers' own doors.

Its integration of bitsandbytes quantises nn.Linear only, which leaves 97 % of Qwen3-Next in 16
bits. Here routed experts are quantised too: by a quantiser under a name of its own, so that nothing
changes for who asks for bitsandbytes, and by weight converters that read one expert at a time, so
that memory holds the quantised weights and one expert (one tensor of all experts where the
checkpoint stores them as one). The same quantiser reads what `quantized_cache` wrote.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from studio.errors import EngineError
from workers.engine.quantize import (
    EXPERT_WEIGHTS,
    SIXTEEN_BIT,
    keep_state,
    other_shape,
    packed_parameter,
    quantise_experts,
)

METHOD = "studio_nf4"
_STATE_PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
)


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """What `from_pretrained` is asked for.

    Args:
        compute_dtype: Dtype that linear layers multiply in.
        storage: Dtype that packed bytes are kept in.
    """

    def __init__(
        self, compute_dtype: torch.dtype | str, storage: torch.dtype | str = "uint8", **_other: Any
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=list(SIXTEEN_BIT),
        )
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return what the constructor takes: transformers reads `load_in_4bit` as its own method."""
        return {
            "quant_method": METHOD,
            "compute_dtype": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "storage": str(self.bnb_4bit_quant_storage).removeprefix("torch."),
        }


class _QuantiseLinear(Bnb4bitQuantize):
    """bitsandbytes' own operation, after a look at the shape, which transformers skips."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Quantise one weight; see `ConversionOps.convert`."""
        assert model is not None
        done: dict[str, torch.Tensor] = {}
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            if isinstance(value, Params4bit):  # quantised already, one expert at a time
                done[name] = value
                continue
            expected = model.get_parameter(name).shape
            if value.shape != expected:
                raise other_shape(f"The tensors {name}", value.shape, expected)
            if name.endswith(EXPERT_WEIGHTS):
                storage = self.hf_quantizer.quantization_config.bnb_4bit_quant_storage
                parameter = quantise_experts(value, expected, storage)
                keep_state(model, name, parameter)
                done[name] = parameter
            else:
                done |= super().convert({name: value}, full_layer_name, model, **kwargs)
        return done


class _ReadQuantised(Bnb4bitDeserialize):
    """Put a weight together from what `quantized_cache` wrote."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the weight of one layer; see `ConversionOps.convert`."""
        assert model is not None
        assert full_layer_name is not None
        key = next((name for name in EXPERT_WEIGHTS if name in input_dict), None)
        if key is None:
            read: dict[str, torch.Tensor] = super().convert(
                input_dict, model=model, full_layer_name=full_layer_name, **kwargs
            )
            return read
        parts = {name: value[0] for name, value in input_dict.items()}
        packed = parts.pop(key)
        state = QuantState.from_dict(parts, device=packed.device)
        parameter = packed_parameter(packed, state)
        keep_state(model, full_layer_name, parameter)
        return {key: parameter}


class _ExpertByExpert(WeightConverter):
    """Read, join and quantise the tensors of one expert before those of the next are read."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Return the quantised weight of all experts; see `WeightConverter.convert`."""
        columns = [self.collected_tensors.pop(key, []) for key in self.source_patterns]
        shape = model.get_parameter(layer_name).shape
        if len({len(column) for column in columns}) != 1:
            raise EngineError(
                f"The weights for {layer_name} have tensors of some experts missing.",
                "Compare the folder with the published one; a download may be incomplete.",
            )
        storage = hf_quantizer.quantization_config.bnb_4bit_quant_storage
        experts = (torch.cat([read() for read in row]) for row in zip(*columns, strict=True))
        parameter = quantise_experts(experts, shape, storage)
        keep_state(model, layer_name, parameter)
        return {layer_name: parameter}


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantiser, and the routed experts."""

    serialized_names: dict[str, list[str]] = {  # noqa: RUF012  transformers' declaration
        **Bnb4BitHfQuantizer.serialized_names,
        **{name: [name, *(f"{name}.{part}" for part in _STATE_PARTS)] for name in EXPERT_WEIGHTS},
    }

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Return whether a parameter goes to 4 bits; also asked for the size to reserve."""
        if param_name.endswith(EXPERT_WEIGHTS):
            return True
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation for weights that the checkpoint holds as one tensor."""
        return _QuantiseLinear(self)  # type: ignore[no-untyped-call]

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the operation for weights that are in 4 bits on disk."""
        return {"deserialize": _ReadQuantised}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Put converters that read expert by expert in the place of those that read all."""
        conversions = super().update_weight_conversions(  # type: ignore[no-untyped-call]
            weight_conversions, model
        )
        return [self._streamed(conversion) for conversion in conversions]

    def _streamed(self, conversion: Any) -> Any:
        is_for_experts = (
            not self.pre_quantized
            and isinstance(conversion, WeightConverter)
            and len(conversion.target_patterns) == 1
            and conversion.target_patterns[0].endswith(EXPERT_WEIGHTS)
        )
        if not is_for_experts:
            return conversion
        streamed = _ExpertByExpert(
            list(conversion.source_patterns),
            list(conversion.target_patterns),
            conversion.operations,
        )
        streamed.scope_prefix = conversion.scope_prefix
        streamed.base_model_prefix = conversion.base_model_prefix
        return streamed

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # transformers refuses to cast a model of that method to another dtype, which would break
        # bytes that are kept as floats.
        vars(model)["quantization_method"] = QuantizationMethod.BITS_AND_BYTES
        done: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return done
