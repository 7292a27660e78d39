"""A merge changes what the Adapter targets, nothing else, and its Certificate cannot be fooled."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.disk import Home, OrderFolder
from studio.domain.certificate import MAX_DELTA_KEPT_ERROR, MAX_MEAN_KL, Certificate
from studio.domain.orders import MergeOrder
from studio.domain.spec import ModelRef
from studio.domain.targets import TargetModule, target_modules
from studio.errors import MachineError
from tests.workers.conftest import GROUPS
from workers.adapter import read_adapter
from workers.carried import of_all_experts
from workers.certify import certify
from workers.engine.lora import load_adapter
from workers.engine.model import find_base, load_base
from workers.merge import check_space, copy_other_files, merge, write_weights
from workers.placing import place
from workers.process import EXIT_INPUT
from workers.shards import INDEX, SINGLE, find_shards

FAMILIES = ("tiny/qwen3.5", "tiny/qwen3.5-moe", "tiny/qwen3-next")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def order(models_home: Home) -> Iterator[Callable[..., OrderFolder]]:
    """Write an order in a fresh folder under the models_home."""
    made: list[Path] = []

    def write(model_id: str, adapter: Path) -> OrderFolder:
        folder = models_home.merge(len(list(models_home.merges.iterdir())) + 1)
        folder.path.mkdir()
        made.append(folder.path)
        asked = MergeOrder(model=ModelRef(id=model_id), adapter=str(adapter), run_id=1)
        folder.order.write_text(asked.model_dump_json(), encoding="utf-8")
        return folder

    yield write
    for path in made:
        shutil.rmtree(path)


def _certificate(folder: OrderFolder) -> Certificate:
    return Certificate.model_validate_json(folder.certificate.read_text(encoding="utf-8"))


def _merged(order: Callable[..., OrderFolder], model_id: str, adapter: Path) -> OrderFolder:
    folder = order(model_id, adapter)
    merge(folder)
    return folder


@pytest.mark.parametrize("model_id", FAMILIES)
def test_a_merge_is_certified_and_loads_as_an_ordinary_folder(
    model_id: str,
    models_home: Home,
    order: Callable[..., OrderFolder],
    adapter_of: Callable[[str], Path],
) -> None:
    folder = _merged(order, model_id, adapter_of(model_id))
    certificate = _certificate(folder)
    base = find_base(ModelRef(id=model_id), models_home)
    modules = target_modules(json.loads((base / "config.json").read_bytes()))
    names = [name for m in modules if m.group in GROUPS[model_id] for name in _tensors(m)]

    assert certificate.failures == ()
    assert certificate.changed_tensors == certificate.targeted_tensors
    assert sorted(certificate.targeted_tensors) == sorted(names)
    assert certificate.effect_kl > 4 * MAX_MEAN_KL
    assert certificate.dtype == "bfloat16"
    assert len(certificate.prompts) == 8
    assert (folder.weights / "certificate.json").read_text() == folder.certificate.read_text()
    assert set(certificate.files) == {
        str(path.relative_to(folder.weights))
        for path in folder.weights.rglob("*")
        if path.is_file() and path.name != "certificate.json"
    }
    model = AutoModelForCausalLM.from_pretrained(folder.weights)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [
        *json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder.weights)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert json.loads(folder.stage.read_text())["fraction"] == 1.0


@pytest.mark.parametrize("model_id", FAMILIES)
def test_a_merge_equals_peft_merge_and_unload(
    model_id: str,
    models_home: Home,
    tmp_path: Path,
    adapter_of: Callable[[str], Path],
    order: Callable[..., OrderFolder],
) -> None:
    source = _float32_copy(find_base(ModelRef(id=model_id), models_home), tmp_path / "base")
    base, adapter = find_shards(source), read_adapter(adapter_of(model_id))
    merged = tmp_path / "merged"
    merged.mkdir()
    folder = order(str(source), adapter_of(model_id))
    write_weights(folder, base, adapter.changes, place(adapter, base), merged)
    copy_other_files(base, merged)
    ours = load_base(merged, method="lora").state_dict()
    loaded = load_adapter(load_base(source, method="lora"), adapter_of(model_id))
    theirs = loaded.merge_and_unload().state_dict()

    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_many_shards_and_a_vision_layout_keep_names_and_every_other_bit(
    models_home: Home,
    tmp_path: Path,
    adapter_of: Callable[[str], Path],
    order: Callable[..., OrderFolder],
) -> None:
    base = _as_published(find_base(ModelRef(id=FAMILIES[1]), models_home), tmp_path / "published")
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"the base, not the merge")
    folder = _merged(order, str(base), adapter_of(FAMILIES[1]))
    certificate, before, after = (
        _certificate(folder),
        find_shards(base),
        find_shards(folder.weights),
    )

    assert certificate.failures == ()
    assert len(before.files) > 3
    assert before.file_of == after.file_of
    assert (folder.weights / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert all(name.startswith("model.language_model.") for name in certificate.changed_tensors)
    assert {"mtp.fc.weight", "model.visual.pos_embed.weight"} <= after.file_of.keys()
    targeted = set(certificate.targeted_tensors)
    assert {"model.language_model.layers.0.mlp.experts.*.up_proj.weight"} <= targeted
    for key in [key for key in before.file_of if of_all_experts(key) not in targeted]:
        assert torch.equal(before.read(key).view(torch.uint8), after.read(key).view(torch.uint8))
    assert (folder.weights / "preprocessor_config.json").exists()
    assert not (folder.weights / "pytorch_model.bin").exists()


def test_a_lost_wrong_or_foreign_change_fails_the_certificate_by_name(
    models_home: Home, adapter_of: Callable[[str], Path], order: Callable[..., OrderFolder]
) -> None:
    folder = _merged(order, FAMILIES[2], adapter_of(FAMILIES[2]))
    base = find_shards(find_base(ModelRef(id=FAMILIES[2]), models_home))
    tensors = load_file(folder.weights / SINGLE)
    # The gates of one delta net: the least that can be lost, see studio/domain/certificate.py.
    lost, doubled = (f"model.layers.{n}.linear_attn.in_proj_ba.weight" for n in (1, 2))
    tensors[lost] = base.read(lost)
    tensors[doubled] = 2 * tensors[doubled] - base.read(doubled)
    tensors["model.norm.weight"] += 0.01
    tensors["model.new.weight"] = torch.ones(1)
    save_file(tensors, folder.weights / SINGLE)
    said = " ".join(_certified_again(folder, models_home).failures)

    assert f"Not changed, though targeted: {lost}." in said
    assert f"Changed by another amount than the Adapter's: {doubled} (200%)." in said
    assert "Changed, though not targeted: model.new.weight, model.norm.weight." in said


def test_a_lost_change_is_told_apart_from_rounding_with_a_wide_margin(
    models_home: Home, adapter_of: Callable[[str], Path], order: Callable[..., OrderFolder]
) -> None:
    folder = _merged(order, FAMILIES[0], adapter_of(FAMILIES[0]))
    base = find_shards(find_base(ModelRef(id=FAMILIES[0]), models_home))
    good = load_file(folder.weights / SINGLE)
    lost = "model.layers.3.self_attn.k_proj.weight"
    honest = _certificate(folder)
    save_file({**good, lost: base.read(lost)}, folder.weights / SINGLE)
    one_lost = _certified_again(folder, models_home)
    save_file({key: base.read(key) for key in good}, folder.weights / SINGLE)
    all_lost = _certified_again(folder, models_home)

    assert max(abs(k - 1) for k in honest.delta_kept.values()) < MAX_DELTA_KEPT_ERROR / 5
    assert max(abs(k - 1) for k in honest.delta_held.values()) < 0.01
    assert honest.mean_kl < MAX_MEAN_KL / 10
    assert one_lost.delta_kept[lost] == 0
    assert one_lost.missing_tensors == (lost,)
    assert not one_lost.passed
    assert all_lost.mean_kl > 4 * MAX_MEAN_KL
    assert "The merge answers differently from base and Adapter" in all_lost.failures[-1]


def test_too_little_disk_is_said_with_both_numbers() -> None:
    check_space(needed_bytes=10**9, free_bytes=10**9, where=Path("/data"))
    with pytest.raises(MachineError, match=r"needs 160\.0 GB .*/data, 3\.0 GB are free"):
        check_space(needed_bytes=160 * 10**9, free_bytes=3 * 10**9, where=Path("/data"))


def test_a_wrong_order_ends_with_a_sentence_and_its_exit_code(tmp_path: Path) -> None:
    folder = OrderFolder(path=tmp_path / "merges" / "000001")
    folder.path.mkdir(parents=True)
    folder.order.write_text('{"version": 1, "model": {"id": "tiny/none"}, "run_id": 1}')
    command = [sys.executable, "-m", "workers.merge", str(folder.path)]
    done = subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=60)
    error = json.loads(folder.error.read_text())

    assert done.returncode == EXIT_INPUT
    assert error["type"] == "InputError"
    assert "give adapter or trained" in error["message"]
    assert error["hint"]


def test_a_merge_dies_with_its_parent_leaves_no_model_and_the_next_one_cleans_up(
    adapter_of: Callable[[str], Path], order: Callable[..., OrderFolder]
) -> None:
    folder = order(FAMILIES[0], adapter_of(FAMILIES[0]))
    script = "import subprocess, sys; subprocess.run([sys.executable, '-m', *sys.argv[1:]])"
    parent = subprocess.Popen([sys.executable, "-c", script, "workers.merge", str(folder.path)])
    _until(lambda: any(folder.path.glob(".model.*/*.safetensors")))
    parent.kill()
    parent.wait()

    _until(lambda: not _running(folder))
    assert not folder.weights.exists()
    assert not folder.certificate.exists()
    merge(folder)
    assert folder.weights.exists()
    assert not list(folder.path.glob(".model.*"))


def _tensors(module: TargetModule) -> list[str]:
    """Return what a Certificate calls the tensors of a tiny model in which a layer lies."""
    if module.kind != "experts":
        return [f"{module.full_name}.weight"]
    experts, _, parameter = module.full_name.rpartition(".")
    matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    return [f"{experts}.*.{matrix}.weight" for matrix in matrices[parameter]]


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _running(folder: OrderFolder) -> bool:
    """Return whether a process of the order is left, by its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder.path) in path.read_text():
                return True
    return False


def _certified_again(folder: OrderFolder, models_home: Home) -> Certificate:
    order = MergeOrder.model_validate_json(folder.order.read_text())
    base = find_shards(find_base(order.model, models_home))
    return certify(folder, order=order, base=base, merged=folder.weights)


def _float32_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = {key: value.float() for key, value in load_file(source / SINGLE).items()}
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


def _as_published(source: Path, target: Path) -> Path:
    """Fake the layout of a hub model with vision tower and MTP, in several shards."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        key.replace("model.", "model.language_model.", 1)
        if key.startswith("model.")
        else key: value
        for key, value in load_file(source / SINGLE).items()
    }
    tensors["mtp.fc.weight"] = torch.randn(256, 512, dtype=torch.bfloat16)
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(512, 256, dtype=torch.bfloat16)
    tensors["model.visual.pos_embed.weight"] = torch.full((8, 8), float("nan"))
    names = sorted(tensors)
    size = -(-len(names) // 5)
    weight_map = {}
    for number in range(5):
        file = f"model-{number + 1:05d}-of-00005.safetensors"
        part = names[number * size : (number + 1) * size]
        save_file({key: tensors[key] for key in part}, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target
