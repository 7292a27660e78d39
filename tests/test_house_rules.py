"""The rules of the house that no linter knows: sizes, names, who knows whom, the README's tree."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.preset import load_models, load_presets
from studio.services import chats, datasets
from studio.services.studio import Studio

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for top in ("studio", "workers") for path in (ROOT / top).rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 350, 60, 7
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "core"}
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "safetensors",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# ---- sizes and names --------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_fits_into_one_reading(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_one_page(path: Path) -> None:
    long = {
        node.name: length
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_takes_few_arguments(path: Path) -> None:
    # Keyword-only ones count too, unused ones (_name) do not, as in ruff's PLR0913.
    many = {}
    for node in functions(path):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(not argument.arg.startswith("_") for argument in given)
        if count > MAX_ARGUMENTS:
            many[node.name] = count
    assert many == {}


def test_every_file_has_a_name_that_says_what_is_in_it() -> None:
    parts = {part for path in EVERYTHING for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & NAMELESS == set()


# ---- who knows whom ---------------------------------------------------------------------------


def test_the_studio_never_imports_the_workers() -> None:
    guilty = [
        name_of(path)
        for path in SOURCES
        if path.is_relative_to(ROOT / "studio")
        and any(module.split(".")[0] == "workers" for module in imports(path))
    ]
    assert guilty == []


@pytest.mark.parametrize("module", ["studio.ui.app", "studio.__main__", "workers.tasks"])
def test_page_command_line_and_tasks_load_nothing_of_the_gpu_stack(module: str) -> None:
    code = (
        f"import json, sys, {module}; "
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(answer.stdout.splitlines()[-1]) == []


# ---- the README's tree ------------------------------------------------------------------------


def tree() -> list[str]:
    """Return the paths of the tree; those of folders end with a slash."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The tree$.*?^```\w*\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block is not None, "README.md has no fenced block under the heading '## The tree'"
    paths, above = [], list[str]()
    for line in block[1].splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip(" "))
        assert indent % 2 == 0, f"the tree is nested by two spaces a level: {line!r}"
        assert indent // 2 <= len(above), f"the tree skips a level: {line!r}"
        name = line.split()[0]
        above = above[: indent // 2]
        paths.append("".join(above) + name)
        if name.endswith("/"):
            above.append(name)
    return paths


def test_the_tree_names_only_what_exists() -> None:
    wrong = [
        path
        for path in tree()
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert wrong == []


def test_the_tree_names_every_source_file_once() -> None:
    paths = tree()
    assert len(paths) == len(set(paths))
    # An __init__.py says nothing that its folder does not say.
    needed = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert needed - set(paths) == set()


# ---- templates --------------------------------------------------------------------------------


def test_every_template_is_loaded_by_the_code_that_reads_its_folder(studio: Studio) -> None:
    models = load_models(TEMPLATES / "models").values()
    loaded = {
        "presets": {f"{name}.yaml" for name in load_presets(TEMPLATES / "presets")},
        "models": {path.name for path in (TEMPLATES / "models").iterdir()},
        "chat": {model.chat_template for model in models if model.chat_template is not None},
        "data": {datasets.example_file(studio).name, "tidemark-questions.yaml"},
    }
    there = {folder.name: {p.name for p in folder.iterdir()} for folder in TEMPLATES.iterdir()}
    assert there == loaded
    assert len(models) == len(loaded["models"])
    assert datasets.import_example(studio).num_conversations > 0
    assert chats.questions(studio)
