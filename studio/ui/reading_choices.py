"""How a Dataset is read: model, thinking, truncation, cutoff."""

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from studio.domain.data_spec import DataSpec
from studio.domain.reading import EmptyThinkPolicy, ThinkingPolicy, TruncationPolicy
from studio.domain.spec import ModelRef, parse_spec
from studio.services import tokenizers
from studio.services.studio import Studio


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """The choices.

    Attributes:
        model: Whose template and tokenizer.
        cutoff: Longest example in tokens, as typed.
    """

    model: gr.Dropdown
    thinking: gr.Dropdown
    empty_think: gr.Dropdown
    truncation: gr.Dropdown
    cutoff: gr.Textbox

    @property
    def components(self) -> list[gr.components.Component]:
        """All of them, in the order that `read` takes."""
        return [self.model, self.thinking, self.empty_think, self.truncation, self.cutoff]


def build(studio: Studio, prefix: str) -> Choices:
    """Lay out the choices.

    Args:
        studio: The installation.
        prefix: What the components' ids begin with.
    """
    models = tokenizers.choices(studio)
    with gr.Row():
        model = gr.Dropdown(
            label="Read as",
            choices=models,
            value=ModelRef().id,
            allow_custom_value=True,
            min_width=260,
            scale=3,
            elem_id=f"{prefix}-model",
        )
        thinking = _policy(prefix, "thinking", "Thinking", ThinkingPolicy)
        empty_think = _policy(prefix, "empty_think", "Empty think", EmptyThinkPolicy)
        truncation = _policy(prefix, "truncation", "Too long", TruncationPolicy)
        cutoff = gr.Textbox(
            label="Cutoff",
            value=str(DataSpec.model_fields["max_length_tokens"].default),
            max_lines=1,
            min_width=105,
            elem_id=f"{prefix}-cutoff",
        )
    return Choices(
        model=model,
        thinking=thinking,
        empty_think=empty_think,
        truncation=truncation,
        cutoff=cutoff,
    )


def _policy(prefix: str, field: str, label: str, values: Any) -> gr.Dropdown:
    return gr.Dropdown(
        label=label,
        choices=list(get_args(values)),
        value=DataSpec.model_fields[field].default,
        min_width=105,
        elem_id=f"{prefix}-{field.replace('_', '-')}",
    )


def read(values: tuple[Any, ...]) -> tuple[ModelRef, DataSpec]:
    """Return the model and the data section that the choices stand for.

    Raises:
        InputError: The cutoff is no number, or no model is chosen.
    """
    model, thinking, empty_think, truncation, cutoff = values
    spec = parse_spec(
        {
            "model": {"id": (model or "").strip()},
            "data": {
                "thinking": thinking,
                "empty_think": empty_think,
                "truncation": truncation,
                "max_length_tokens": (cutoff or "").strip(),
            },
        }
    )
    return spec.model, spec.data
