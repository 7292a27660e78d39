"""Sample replies: those of the model, with its adapter, and cut where the spec says."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from studio.domain.lora_spec import LoraSpec
from tests.workers.engine.conftest import FAMILIES, small_spec
from workers.engine.lora import add_adapter, base_of
from workers.engine.model import load_base, load_tokenizer
from workers.engine.samples import sample_replies


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_is_answered_and_the_mode_is_kept(
    family: str, bases: Mapping[str, Path]
) -> None:
    model = add_adapter(load_base(bases[family], method="lora"), LoraSpec(rank=4)).train()
    tokenizer = load_tokenizer(bases[family])
    prompts = ("How long is the warranty?", "Who are you?")
    spec = small_spec(eval={"prompts": prompts, "prompt_tokens": 5})

    samples = sample_replies(base_of(model), tokenizer, spec, 7)

    assert [sample.prompt for sample in samples] == list(prompts)
    assert {sample.step for sample in samples} == {7}
    assert all(sample.reply and sample.is_cut for sample in samples)
    assert base_of(model).training
    assert samples == sample_replies(base_of(model), tokenizer, spec, 7)


def test_the_adapter_speaks(bases: Mapping[str, Path]) -> None:
    model = add_adapter(load_base(bases["qwen3.5"], method="lora"), LoraSpec(rank=4))
    tokenizer = load_tokenizer(bases["qwen3.5"])
    spec = small_spec(eval={"prompts": ["Who are you?"], "prompt_tokens": 8})
    before = sample_replies(base_of(model), tokenizer, spec, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert sample_replies(base_of(model), tokenizer, spec, 0)[0].reply != before[0].reply
