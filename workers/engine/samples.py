"""Replies to fixed prompts while a run trains, the likeliest token each time."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.domain.sample import Sample
from studio.domain.spec import JobSpec


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: JobSpec, step: int
) -> list[Sample]:
    """Ask every sample prompt of a spec.

    Args:
        model: Base with its adapter inside; its mode is as before afterwards.
        tokenizer: With a chat template.
        spec: `eval.prompts`, `eval.prompt_tokens`; thinks where thinking is trained.
        step: Steps done so far.
    """
    was_training = model.training
    model.train(False)
    try:
        return [_ask(model, tokenizer, spec, prompt, step) for prompt in spec.eval.prompts]
    finally:
        model.train(was_training)


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: JobSpec,
    prompt: str,
    step: int,
) -> Sample:
    inputs: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        enable_thinking=spec.data.thinking == "train",
        return_dict=True,
        return_tensors="pt",
    )
    inputs = inputs.to(model.device)
    generated: Any = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=spec.eval.prompt_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    tokens: list[int] = generated[0, inputs["input_ids"].shape[1] :].tolist()
    return Sample(
        step=step,
        prompt=prompt,
        reply=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        is_cut=tokenizer.eos_token_id not in tokens,
    )
