"""Tokenizers of the tiny models: same bytes each time, whole or not at all, no transformers."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from studio.disk import TEMPLATES, Home
from studio.domain.preset import KnownModel, load_models
from studio.errors import InputError, MachineError
from studio.tokens.tiny import ensure_tiny_tokenizer

FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


def known(name: str = "tiny/qwen3.5") -> KnownModel:
    return load_models(TEMPLATES / "models")[name]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_template_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [ensure_tiny_tokenizer(known(), tmp_path / name) for name in ("a", "b")]
    assert contents(folders[0]) == contents(folders[1])
    assert sorted(contents(folders[0])) == FILES


def test_the_page_has_a_place_for_it(tmp_path: Path) -> None:
    home = Home(path=tmp_path)
    assert home.tiny_tokenizer("tiny/qwen3.5") == home.models / "qwen3.5-tokenizer"


def test_several_who_ask_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "t"
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: ensure_tiny_tokenizer(known(), folder), range(4)))
    assert set(found) == {folder}
    assert sorted(path.name for path in folder.parent.iterdir()) == [".t.lock", "t"]


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = ensure_tiny_tokenizer(known(), tmp_path / "t")
    (folder / "tokenizer.json").write_text("{}")
    ensure_tiny_tokenizer(known(), folder)
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_a_model_that_is_not_built_here_is_refused(tmp_path: Path) -> None:
    bare = known().model_copy(update={"vocab_size": None})
    with pytest.raises(InputError, match="cannot be built here"):
        ensure_tiny_tokenizer(bare, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_disk_that_refuses_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(MachineError, match="cannot be written"):
        ensure_tiny_tokenizer(known(), tmp_path / "models" / "t")


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, studio.tokens.tiny; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=TEMPLATES.parent).returncode == 0
