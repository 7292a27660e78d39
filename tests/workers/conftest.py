"""Real tiny models, built once, and Adapters on them that are as large as trained ones."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from studio.disk import Home
from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import ModelRef
from studio.domain.targets import TargetGroup
from tests.workers.small_models import save_model
from workers.engine.lora import add_adapter
from workers.engine.model import find_base, load_base

_MIXER = ("attention", "delta_net", "delta_net_gates")
_SHARED = ("shared_expert", "shared_expert_gate")
GROUPS = {
    "tiny/qwen3.5": (*_MIXER, "dense_mlp"),
    "tiny/qwen3.5-moe": (*_MIXER, *_SHARED, "routed_experts"),
    "tiny/qwen3-next": (*_MIXER, *_SHARED, "routed_experts", "router"),
}
# Root mean square of the entries of B after 80 steps at learning rate 5e-3: 0.015 to 0.035.
TRAINED_B = 0.025


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread; several wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Return a home folder whose tiny models are built once for all tests."""
    home = Home(path=tmp_path_factory.mktemp("home"))
    home.create()
    return home


@pytest.fixture(scope="session")
def speaking(models_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a small bfloat16 model of a family, with the tokenizer of a tiny one."""
    folder = tmp_path_factory.mktemp("speaking")

    def build(family: str) -> Path:
        if not (folder / family).exists():
            source = find_base(ModelRef(id="tiny/qwen3.5"), models_home)
            vocab_size = json.loads((source / "config.json").read_bytes())["vocab_size"]
            save_model(family, folder / family, dtype=torch.bfloat16, vocab_size=vocab_size)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(source / name, folder / family / name)
        return folder / family

    return build


@pytest.fixture(scope="session")
def adapter_of(models_home: Home) -> Callable[[str], Path]:
    """Return the folder of an Adapter on all targets, by the id of a tiny model."""

    def find(model_id: str) -> Path:
        folder = models_home.runs / model_id.replace("/", "-") / "adapter"
        if not folder.exists():
            _save_adapter(model_id, models_home, folder)
        return folder

    return find


def _save_adapter(model_id: str, home: Home, folder: Path) -> None:
    base = load_base(find_base(ModelRef(id=model_id), home), method="lora")
    groups = tuple(TargetGroup(name) for name in GROUPS[model_id])
    torch.manual_seed(1)
    model = add_adapter(base, LoraSpec(rank=32, alpha=64, targets=groups))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=TRAINED_B)
    model.save_pretrained(str(folder))
