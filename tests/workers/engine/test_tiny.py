"""The tiny models: same bytes each time, and ordinary Hugging Face folders."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from studio.disk import TEMPLATES, Home
from studio.domain.preset import KnownModel, load_models
from studio.errors import InputError
from studio.tokens.tiny import ensure_tiny_tokenizer
from studio.tokens.tokenizer import load, tokenizer_sha256
from tests.workers.engine.conftest import FAMILIES
from workers.engine.model import load_tokenizer
from workers.engine.tiny import ensure_tiny


def known(family: str) -> KnownModel:
    return load_models(TEMPLATES / "models")[f"tiny/{family}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_template_gives_the_same_bytes(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert contents(ensure_tiny(known(family), tmp_path / family)) == contents(bases[family])
    assert torch.equal(torch.get_rng_state(), before)


def test_two_builders_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: ensure_tiny(known("qwen3.5"), folder), range(2)))
    assert found == [folder, folder]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_an_existing_folder_is_left_alone(bases: dict[str, Path]) -> None:
    before = (bases["qwen3.5"] / "config.json").stat().st_mtime_ns
    ensure_tiny(known("qwen3.5"), bases["qwen3.5"])
    assert (bases["qwen3.5"] / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_of_the_page_is_that_of_the_model(
    family: str, bases: dict[str, Path], home: Home
) -> None:
    folder = ensure_tiny_tokenizer(known(family), home.tiny_tokenizer(known(family).id))
    assert contents(folder).items() <= contents(bases[family]).items()
    assert tokenizer_sha256(folder) == tokenizer_sha256(bases[family])
    assert load(folder, home.verdicts).sha256 == tokenizer_sha256(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_is_written_as_transformers_writes_it(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    written = Tokenizer.from_file(str(bases[family] / "tokenizer.json"))
    again = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=written,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    again.chat_template = load_tokenizer(bases[family]).chat_template
    again.save_pretrained(tmp_path)
    assert contents(tmp_path).items() <= contents(bases[family]).items()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_folder_as_any_other(family: str, bases: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[family])
    tokenizer = load_tokenizer(bases[family])
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_tokens_are_those_of_the_family(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(bases["qwen3.5"])
    text = (
        "<|im_start|>user\nIt's 7304, \u00e9h?<|im_end|>\n<think>\n\n</think>\n\n\u6f6e \U0001f30a"
    )
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert [t for t in tokenizer.convert_ids_to_tokens(tokens) if t in marks] == marks
    plain = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "<|im_start|>" not in plain
    assert "<think>" in plain


def test_a_template_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = known("qwen3.5").model_copy(update={"vocab_size": None})
    with pytest.raises(InputError, match="no vocab_size"):
        ensure_tiny(bare, tmp_path / "model")


def test_a_vocabulary_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    config = {**known("qwen3.5").config, "vocab_size": 320}
    with pytest.raises(InputError, match=r"config.vocab_size is 320"):
        ensure_tiny(known("qwen3.5").model_copy(update={"config": config}), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]
