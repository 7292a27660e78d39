"""Replies equal generate's, whoever takes turns with them, and their text comes in whole pieces."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel

from studio.disk import Home
from studio.domain.chat_template import render
from studio.domain.spec import LoraSpec, ModelRef
from studio.domain.targets import TargetGroup
from studio.errors import EngineError
from workers.decode import Chooser, Sampling, Voice, decode
from workers.engine.model import add_adapter, find_base, load_adapter, load_base, load_tokenizer
from workers.reply import Detokenizer, Piece, Splitter, StopCutter, pieces

FAMILIES = ("tiny/qwen3.5", "tiny/qwen3.5-moe", "tiny/qwen3-next")
GREEDY = Sampling()
QUESTION = [{"role": "user", "content": "How often should I calibrate it?"}]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread; several wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(path=tmp_path_factory.mktemp("home"))
    home.create()
    return home


def _save_adapter(model_id: str, home: Home) -> Path:
    folder = home.runs / model_id.replace("/", "-")
    if not folder.exists():
        base = load_base(find_base(ModelRef(id=model_id), home), method="lora")
        groups = (TargetGroup.ATTENTION, TargetGroup.DELTA_NET, TargetGroup.DELTA_NET_GATES)
        torch.manual_seed(1)
        model = add_adapter(base, LoraSpec(rank=8, targets=groups))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(str(folder))
    return folder


# ---- decoding ---------------------------------------------------------------------------------


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
        output = model.generate(
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
    [*((family, "qlora") for family in FAMILIES), ("tiny/qwen3-next", "lora")],
)
def test_interleaved_greedy_replies_equal_generate(
    model_id: str, method: Literal["qlora", "lora"], home: Home
) -> None:
    folder = find_base(ModelRef(id=model_id), home)
    model = load_adapter(load_base(folder, method=method), _save_adapter(model_id, home))
    tokenizer = load_tokenizer(folder)
    first = tokenizer.encode(
        render(str(tokenizer.chat_template), QUESTION, add_generation_prompt=True)
    )
    second = tokenizer.encode("The tide is the rise and fall of the sea, " * 5)
    with model.disable_adapter():
        expected_base = [_generated(model, prompt, 24) for prompt in (first, second)]
    expected_tuned = [_generated(model, prompt, 24) for prompt in (first, second)]
    base, tuned = Voice(model), Voice(model, with_adapter=True)
    turns = [
        _tokens(base, first, 24),
        _tokens(tuned, first, 24),
        _tokens(base, second, 24),
        _tokens(tuned, second, 24),
    ]
    replies = [list(reply) for reply in zip(*zip(*turns, strict=True), strict=True)]

    assert expected_base != expected_tuned
    assert replies[0::2] == expected_base
    assert replies[1::2] == expected_tuned


@pytest.mark.parametrize("model_id", FAMILIES)
def test_a_prompt_read_in_pieces_gives_the_same_reply(model_id: str, home: Home) -> None:
    voice = Voice(load_base(find_base(ModelRef(id=model_id), home), method="lora"))
    prompt = torch.randint(0, 1000, (129,), generator=torch.Generator().manual_seed(3)).tolist()

    assert list(_tokens(voice, prompt, 16, piece=64)) == list(_tokens(voice, prompt, 16))


def test_a_reply_stops_at_a_stop_token_and_at_its_limit(home: Home) -> None:
    voice = Voice(load_base(find_base(ModelRef(id=FAMILIES[0]), home), method="lora"))
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


def test_logits_that_are_not_finite_end_with_a_sentence(home: Home) -> None:
    model = load_base(find_base(ModelRef(id=FAMILIES[0]), home), method="lora")
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        next(_tokens(Voice(model), [1], 1))


# ---- text -------------------------------------------------------------------------------------


def test_text_comes_in_whole_characters_without_special_tokens(home: Home) -> None:
    tokenizer = load_tokenizer(find_base(ModelRef(id=FAMILIES[0]), home))

    def text_of(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    sentence = "Gr\u00fc\u00dfe \u4f60\u597d \N{WATER WAVE}\u200d\N{HEAVY BLACK HEART}<|im_end|>!"
    noise = torch.randint(0, len(tokenizer), (400,), generator=torch.Generator().manual_seed(1))
    for tokens in (tokenizer.encode(sentence), noise.tolist()):
        writer = Detokenizer(text_of)
        parts = [writer.push(token) for token in tokens]
        assert not any(part.endswith("\N{REPLACEMENT CHARACTER}") for part in parts)
        assert "".join(parts) + writer.flush() == text_of(tokens)
    assert "im_end" not in text_of(tokenizer.encode(sentence))


def test_a_stop_sequence_cuts_wherever_the_pieces_break() -> None:
    text = "one STO two STOP three"
    for size in range(1, len(text)):
        cutter = StopCutter(["STOP", "three"])
        parts = [cutter.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert cutter.is_cut
        assert "".join(itertools.takewhile(lambda part: part is not None, parts)).startswith(
            "one STO two "
        )
    cutter = StopCutter(["STOP"])
    assert (cutter.push("almost STO"), cutter.flush(), cutter.is_cut) == ("almost ", "STO", False)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thinking_is_told_from_content_wherever_the_pieces_break(size: int) -> None:
    text = "First </th a, then\n\nb.\n</think>\n\nThe answer\n</think> is c."
    splitter = Splitter(is_thinking=True)
    parts = [splitter.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(splitter.flush())

    assert "".join(part[0] for part in parts) == "First </th a, then\n\nb."
    assert "".join(part[1] for part in parts) == "The answer\n</think> is c."


def test_a_reply_says_why_it_ended() -> None:
    letters = dict(enumerate("abcdefgh"))

    def last(stop: list[str], *, ends: int = 99) -> tuple[str, Piece]:
        found = list(
            pieces(
                [0, None, 1, 2, 3],
                lambda tokens: "".join(letters[token] for token in tokens),
                stop_ids=frozenset([ends]),
                stop=stop,
                is_thinking=False,
            )
        )
        return "".join(piece.content for piece in found), found[-1]

    assert last([]) == ("abcd", Piece(num_tokens=4, content="", finish_reason="length"))
    assert last([], ends=2) == ("ab", Piece(num_tokens=3, content="", finish_reason="stop"))
    assert last(["bc"])[0] == "a"
    assert last(["bc"])[1].finish_reason == "stop"
    assert last(["dx"])[0] == "abcd"
