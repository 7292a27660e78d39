"""Real tiny models and real run folders, built once a session."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import transformers

from studio.disk import TEMPLATES, Home, RunFolder
from studio.domain.conversation import Conversation, Record
from studio.domain.openai_messages import from_openai
from studio.domain.spec import JobSpec, ModelRef, parse_spec
from studio.domain.targets import TargetGroup
from workers.engine.data import Examples, read_data
from workers.engine.model import find_base

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

FAMILIES = ("qwen3.5", "qwen3.5-moe", "qwen3-next")
GROUPS = {
    "qwen3.5": ("attention", "delta_net", "delta_net_gates", "dense_mlp"),
    "qwen3.5-moe": ("attention", "delta_net", "delta_net_gates", "shared_expert"),
    "qwen3-next": ("attention", "delta_net", "delta_net_gates", "shared_expert"),
}
MakeRun = Callable[..., RunFolder]


def all_groups(family: str) -> tuple[TargetGroup, ...]:
    return tuple(TargetGroup(name) for name in GROUPS[family])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(path=tmp_path_factory.mktemp("home"))
    home.create()
    return home


@pytest.fixture(scope="session")
def bases(home: Home) -> dict[str, Path]:
    """Folder of each tiny family."""
    return {family: find_base(ModelRef(id=f"tiny/{family}"), home) for family in FAMILIES}


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    """The whole example data set."""
    text = (TEMPLATES / "data" / "tidemark-support.jsonl").read_text(encoding="utf-8")
    return [from_openai(json.loads(line)) for line in text.splitlines()]


@pytest.fixture(scope="session")
def dataset(home: Home, conversations: list[Conversation]) -> Path:
    """Canonical JSONL of a few short conversations."""
    short = (c for c in conversations if not c.tools)
    return store(home, list(islice(short, 24)))


def store(home: Home, records: Sequence[Record]) -> Path:
    """Write records as a Dataset of a home folder; return its file, which its hash names."""
    content = b"".join(record.to_line() for record in records)
    path = home.dataset(hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return path


MakeExamples = Callable[..., Examples]


@pytest.fixture
def make_examples(home: Home, bases: Mapping[str, Path]) -> MakeExamples:
    """Read conversations as a base does: `make_examples(records, "qwen3-next", thinking=...)`."""

    def make(records: Sequence[Record], family: str = "qwen3.5", **data: Any) -> Examples:
        path = store(home, records)
        run = home.run(len(list(home.runs.iterdir())) + 1)
        run.path.mkdir()
        run.dataset.symlink_to(path)
        spec = small_spec(data={"dataset": path.stem, **data})
        return read_data(run, spec, bases[family], lambda _: None).training

    return make


@pytest.fixture
def make_run(home: Home, bases: Mapping[str, Path], dataset: Path) -> MakeRun:
    """Make run folders: `make_run(model={...}, train={...})` changes a small qlora spec."""

    def make(**changes: Any) -> RunFolder:
        assert bases
        run = home.run(len(list(home.runs.iterdir())) + 1)
        run.path.mkdir()
        run.spec.write_text(small_spec(**changes).model_dump_json(), encoding="utf-8")
        run.dataset.symlink_to(dataset)
        return run

    return make


def small_spec(**changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "lora": {"rank": 4, "targets": ["attention", "delta_net", "dense_mlp"]},
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
        "optim": {"learning_rate": 1e-3},
        "train": {"max_steps": 3, "recompute": "none"},
    }
    for section, fields in changes.items():
        values[section] = (
            {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
        )
    return parse_spec(values)
