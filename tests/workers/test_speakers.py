"""A Chat serves a base, and beside it an Adapter on it or a Merge."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import Home
from studio.domain.chat_template import render
from studio.domain.orders import ChatOrder, MergeOrder, parse_order
from studio.domain.spec import ModelRef
from studio.errors import InputError
from workers.decode import Sampling
from workers.engine.model import load_base, load_tokenizer
from workers.merge import merge
from workers.shards import SINGLE
from workers.speakers import Question, Speakers, load_speakers

MODEL = "tiny/qwen3.5"
TOKEN = "a-token-for-this-test"
QUESTION = [{"role": "user", "content": "How often should I calibrate it?"}]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_merged_model_speaks_beside_its_base(
    models_home: Home, adapter_of: Callable[[str], Path]
) -> None:
    adapter = adapter_of(MODEL)
    folder = models_home.merge(1)
    folder.path.mkdir()
    asked = MergeOrder(model=ModelRef(id=MODEL), adapter=str(adapter), run_id=1)
    folder.order.write_text(asked.model_dump_json(), encoding="utf-8")
    merge(folder)

    def replies(**values: str) -> list[str]:
        order = ChatOrder(model=ModelRef(id=MODEL), method="lora", token=TOKEN, **values)
        speakers = load_speakers(order, models_home)
        assert speakers.names == ("base", "tuned")
        return [asyncio.run(_reply(speakers, name)) for name in speakers.names]

    with_merge = replies(merged=str(folder.weights))
    with_adapter = replies(adapter=str(adapter))
    assert with_merge[0] == with_adapter[0]
    assert with_merge[1] not in with_merge[0]
    assert with_merge[1] == _generated(folder.weights)


def test_a_model_that_was_trained_as_a_whole_speaks_beside_its_base(
    speaking: Callable[[str], Path], models_home: Home, tmp_path: Path
) -> None:
    base = speaking("qwen3_5_text")
    trained = shutil.copytree(base, tmp_path / "model")
    tensors = load_file(trained / SINGLE)
    torch.manual_seed(0)
    tensors["lm_head.weight"] += 0.1 * torch.randn_like(tensors["lm_head.weight"])
    save_file(tensors, trained / SINGLE, metadata={"format": "pt"})
    order = ChatOrder(model=ModelRef(id=str(base)), method="full", merged=str(trained), token=TOKEN)
    speakers = load_speakers(order, models_home)

    replies = [asyncio.run(_reply(speakers, name)) for name in speakers.names]
    assert speakers.names == ("base", "tuned")
    assert replies == [_generated(base), _generated(trained)]
    assert replies[0] != replies[1]


def _generated(folder: Path) -> str:
    """Return the greedy reply of a model folder, as anyone gets it from transformers."""
    tokenizer = load_tokenizer(folder)
    prompt = render(
        str(tokenizer.chat_template), QUESTION, add_generation_prompt=True, enable_thinking=False
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = load_base(folder, method="lora")
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=12, do_sample=False
        )  # type: ignore[operator]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


async def _reply(speakers: Speakers, name: str) -> str:
    question = Question(
        speaker=name,
        messages=QUESTION,
        tools=[],
        enable_thinking=False,
        sampling=Sampling(),
        stop=[],
        max_tokens=12,
    )
    prompt = await speakers.read(question)
    return "".join([piece.content async for piece in speakers.answer(question, prompt)])


def test_an_order_with_adapter_and_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="serves one of them"):
        ChatOrder(model=ModelRef(), method="lora", adapter="a", merged="m", token=TOKEN)


def test_the_token_is_not_repeated_in_an_error() -> None:
    text = json.dumps({"version": 1, "token": TOKEN, "method": "none", "model": {}})
    with pytest.raises(InputError, match="method") as caught:
        parse_order(ChatOrder, text)
    assert TOKEN not in str(caught.value)
