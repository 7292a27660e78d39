"""The data of the training benchmark is as long as it says, and a difference ends it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import chat_lengths, training
from studio.disk import TEMPLATES
from studio.domain.preset import load_models
from studio.tokens.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    known = load_models(TEMPLATES / "models")["tiny/qwen3.5"]
    return write_tokenizer(known, tmp_path_factory.mktemp("tokenizer"))


def test_lengths_are_log_normal_and_cut(tokenizer: Tokenizer) -> None:
    made = list(chat_lengths.chats(tokenizer, 400, seed=3))
    texts = ["".join(message["content"] for message in chat["messages"]) for chat in made]
    lengths = np.array([len(each.ids) for each in tokenizer.encode_batch(texts)])
    answers = [chat["messages"][-1]["content"] for chat in made]
    trained = sum(len(each.ids) for each in tokenizer.encode_batch(answers))
    assert lengths.max() < chat_lengths.LONGEST
    assert 480 < lengths.mean() < 620
    assert 0.65 < np.log(lengths).std() < 0.95
    assert 0.25 < trained / lengths.sum() < 0.35
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("found", "is_like"),
    [
        ([1.00001, 2.0], True),
        ([1.0, 2.4], False),
        ([2.0, 4.0], False),
    ],
)
def test_another_direction_or_size_of_a_gradient_is_seen(found: list[float], is_like: bool) -> None:
    expected = {"a": np.ones(3), "b": np.array([1.0, 2.0])}
    cosine, norm = training.likeness({"a": np.ones(3), "b": np.array(found)}, expected)
    assert (cosine > 0.999 and norm < 1e-3) is is_like
    with pytest.raises(SystemExit, match=r"one side alone: \['a'\]"):
        training.likeness({"b": np.array(found)}, expected)


def test_without_trl_it_says_what_to_install() -> None:
    code = (
        "import importlib.util, sys; from benchmarks import training; "
        "importlib.util.find_spec = lambda name: None; sys.argv = ['x']; training.main()"
    )
    root = Path(training.__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert answer.returncode == 1
    assert "pip install trl==1.16.0" in answer.stderr
    assert "Traceback" not in answer.stderr
