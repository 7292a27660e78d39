"""Replies equal those of generate, whoever takes turns with them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel

from studio.disk import Home
from studio.domain.chat_template import render
from studio.domain.spec import ModelRef
from studio.errors import EngineError
from workers.decode import Chooser, Sampling, Voice, decode
from workers.engine.lora import load_adapter
from workers.engine.model import find_base, load_base, load_tokenizer

FAMILIES = ("tiny/qwen3.5", "tiny/qwen3.5-moe", "tiny/qwen3-next")
GREEDY = Sampling()
QUESTION = [{"role": "user", "content": "How often should I calibrate it?"}]


pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(voice: Voice, prompt: list[int], most: int, piece: int = 2048) -> Iterator[int]:
    steps = decode(
        voice,
        prompt,
        Chooser(GREEDY, voice.device),
        stop_ids=frozenset(),
        max_tokens=most,
        prefill_tokens=piece,
    )
    return (token for token in steps if token is not None)


def _generated(model: PeftModel, prompt: list[int], most: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=-1,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("model_id", "method"),
    [("tiny/qwen3.5", "qlora"), ("tiny/qwen3.5-moe", "qlora"), ("tiny/qwen3-next", "lora")],
)
def test_interleaved_greedy_replies_equal_generate(
    model_id: str,
    method: Literal["qlora", "lora"],
    models_home: Home,
    adapter_of: Callable[[str], Path],
) -> None:
    folder = find_base(ModelRef(id=model_id), models_home)
    model = load_adapter(load_base(folder, method=method), adapter_of(model_id))
    tokenizer = load_tokenizer(folder)
    first = tokenizer.encode(
        render(str(tokenizer.chat_template), QUESTION, add_generation_prompt=True)
    )
    second = tokenizer.encode("The tide is the rise and fall of the sea, " * 5)
    with model.disable_adapter():
        expected_base = [_generated(model, prompt, 12) for prompt in (first, second)]
    expected_tuned = [_generated(model, prompt, 12) for prompt in (first, second)]
    base, tuned = Voice(model), Voice(model, with_adapter=True)
    turns = [
        _tokens(base, first, 12),
        _tokens(tuned, first, 12),
        _tokens(base, second, 12),
        _tokens(tuned, second, 12),
    ]
    replies = [list(reply) for reply in zip(*zip(*turns, strict=True), strict=True)]

    assert expected_base != expected_tuned
    assert replies[0::2] == expected_base
    assert replies[1::2] == expected_tuned


@pytest.mark.parametrize("model_id", FAMILIES)
def test_a_prompt_read_in_pieces_gives_the_same_reply(model_id: str, models_home: Home) -> None:
    voice = Voice(load_base(find_base(ModelRef(id=model_id), models_home), method="lora"))
    prompt = torch.randint(0, 1000, (129,), generator=torch.Generator().manual_seed(3)).tolist()

    assert list(_tokens(voice, prompt, 16, piece=64)) == list(_tokens(voice, prompt, 16))


def test_a_reply_stops_at_a_stop_token_and_at_its_limit(models_home: Home) -> None:
    voice = Voice(load_base(find_base(ModelRef(id=FAMILIES[0]), models_home), method="lora"))
    whole = list(_tokens(voice, [1, 2, 3], 12))
    stop = whole[5]
    cut = decode(
        voice, [1, 2, 3], Chooser(GREEDY, voice.device), stop_ids=frozenset([stop]), max_tokens=12
    )

    assert len(whole) == 12
    assert list(cut) == whole[: whole.index(stop) + 1]


def test_sampling_repeats_with_its_seed_and_keeps_to_its_limits() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    best = logits.topk(3).indices.tolist()

    def draw(**values: Any) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.5, **values), torch.device("cpu"))
        return [chooser.choose(logits) for _ in range(50)]

    assert draw(seed=7) == draw(seed=7) != draw(seed=8)
    assert set(draw(seed=1, top_k=3)) == set(best)
    assert set(draw(seed=1, top_p=1e-6)) == {best[0]}
    assert draw() != draw()


def test_logits_that_are_not_finite_end_with_a_sentence(models_home: Home) -> None:
    model = load_base(find_base(ModelRef(id=FAMILIES[0]), models_home), method="lora")
    model.get_parameter("lm_head.weight").data.fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        next(_tokens(Voice(model), [1], 1))
