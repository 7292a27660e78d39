"""A Certificate names the one expert that was lost, swapped, or read in a wrong layout."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import Home
from studio.domain.certificate import Certificate
from studio.domain.orders import MergeOrder
from studio.domain.spec import ModelRef
from tests.workers.small_models import (
    EXPERT_TARGETS,
    EXPERTS,
    INNER,
    RANK,
    fuse_experts,
    save_adapter,
)
from workers.adapter import read_adapter
from workers.carried import changes_carried, summed_up
from workers.low_rank import ExpertsLowRank, LowRank
from workers.meaning import meanings
from workers.merge import merge, write_weights
from workers.placing import place
from workers.shards import SINGLE, Shards, changed_tensors, find_shards

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = {"each by itself": False, "stacks": True}


class Merged:
    """A base with experts, an Adapter on them, and the Certificate of its honest Merge."""

    def __init__(self, base: Path, home: Home, tmp_path: Path) -> None:
        self.base = find_shards(base)
        self.adapter = save_adapter(
            base,
            tmp_path / "adapter",
            target_modules=["q_proj"],
            target_parameters=[*EXPERT_TARGETS, "mlp.gate.weight"],
            lora_alpha=3,
        ).folder
        self.folder = home.merge(9000 + len(list(home.merges.iterdir())))
        self.folder.path.mkdir()
        order = MergeOrder(model=ModelRef(id=str(base)), adapter=str(self.adapter), run_id=1)
        self.folder.order.write_text(order.model_dump_json(), encoding="utf-8")
        merge(self.folder)
        text = self.folder.certificate.read_text(encoding="utf-8")
        self.honest = Certificate.model_validate_json(text)

    def merged_again(self) -> None:
        """Write the weights once more, with whatever a test has broken."""
        read = read_adapter(self.adapter)
        places = place(read, self.base)
        write_weights(self.folder, self.base, read.changes, places, self.folder.weights)

    @property
    def written(self) -> Shards:
        """What lies on the disk."""
        return find_shards(self.folder.weights)

    def measured_again(self) -> Certificate:
        """Return the Certificate with its tensors measured anew, its prompts as they were."""
        meant = meanings(self.adapter, self.base.folder)
        carried = changes_carried(meant, self.base, self.written)
        summary = summed_up(carried, changed_tensors(self.base, self.written))
        return self.honest.model_copy(
            update={
                "targeted_tensors": summary.targeted,
                "changed_tensors": summary.changed,
                "delta_kept": summary.kept,
                "delta_held": summary.held,
                "idle_experts": summary.idle_experts,
            }
        )


@pytest.fixture(scope="module")
def merges(
    speaking: Callable[[str], Path], models_home: Home, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Merged]]:
    """Merge an Adapter on the experts, once for each layout that published weights have."""
    made: dict[str, Merged] = {}

    def build(layout: str) -> Merged:
        if layout not in made:
            folder = tmp_path_factory.mktemp("merge")
            family = "qwen3_5_moe_text" if LAYOUTS[layout] else "qwen3_next"
            base = shutil.copytree(speaking(family), folder / "base")
            base = fuse_experts(base) if LAYOUTS[layout] else base
            made[layout] = Merged(base, models_home, folder)
        return made[layout]

    yield build
    for one in made.values():
        shutil.rmtree(one.folder.path)


@pytest.fixture(params=LAYOUTS)
def merged(request: pytest.FixtureRequest, merges: Callable[[str], Merged]) -> Iterator[Merged]:
    """Lend a Merge to one test, and undo what the test does to its files."""
    one = merges(request.param)
    files = [one.adapter / "adapter_model.safetensors", one.folder.weights / SINGLE]
    contents = [file.read_bytes() for file in files]
    yield one
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)


def _names(merged: Merged, matrix: str, experts: Sequence[int | str]) -> set[str]:
    """Return how a Certificate calls one matrix of some experts of layer 0."""
    stack = "gate_up_proj" if matrix in ("gate", "up") else "down_proj"
    if f"model.layers.0.mlp.experts.{stack}" in merged.base.file_of:
        role = f", {matrix}" if stack == "gate_up_proj" else ""
        return {f"model.layers.0.mlp.experts.{stack}[{expert}{role}]" for expert in experts}
    return {f"model.layers.0.mlp.experts.{expert}.{matrix}_proj.weight" for expert in experts}


def test_an_honest_merge_of_experts_passes_in_few_lines(merged: Merged) -> None:
    found = merged.honest
    assert found.failures == ()
    assert found.kind == "adapter"
    assert found.changed_tensors == found.targeted_tensors
    assert found.idle_experts == 0
    for matrix in ("gate", "up", "down"):
        (name,) = _names(merged, matrix, ["*"])
        assert found.delta_kept[name] == pytest.approx(1, abs=0.001)
        assert found.delta_held[name] == pytest.approx(1, abs=0.1)
    # Two layers: router, gate, up and down of all experts together; one of them with q_proj.
    assert len(found.delta_kept) == 2 * 4 + 1
    assert merged.measured_again().delta_kept == found.delta_kept


def _parts(change: ExpertsLowRank) -> list[LowRank]:
    return list(REAL_PARTS(change))


REAL_PARTS = ExpertsLowRank.parts


def test_a_dropped_expert_is_named(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_third(change: ExpertsLowRank) -> list[LowRank]:
        parts = _parts(change)
        parts[3] = LowRank(a=parts[3].a, b=0 * parts[3].b, scale=1.0)
        return parts

    monkeypatch.setattr(ExpertsLowRank, "parts", without_third)
    merged.merged_again()
    found = merged.measured_again()
    named = {*found.distorted_tensors, *found.missing_tensors}

    lost = {name for m in ("gate", "up", "down") for name in _names(merged, m, [3])}
    assert {name for name in named if ".layers.0." in name} == lost
    assert all(found.delta_kept[name] == 0 for name in lost)
    assert not found.passed
    assert min(lost) in " ".join(found.failures)


def test_two_swapped_experts_are_named(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(change: ExpertsLowRank) -> list[LowRank]:
        parts = _parts(change)
        parts[1], parts[4] = parts[4], parts[1]
        return parts

    monkeypatch.setattr(ExpertsLowRank, "parts", swapped)
    merged.merged_again()
    found = merged.measured_again()

    wrong = {name for m in ("gate", "up", "down") for name in _names(merged, m, [1, 4])}
    assert {name for name in found.distorted_tensors if ".layers.0." in name} == wrong
    assert all(abs(found.delta_kept[name]) < 0.6 for name in wrong)


def test_gate_and_up_that_changed_places_are_named(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(change: ExpertsLowRank) -> list[LowRank]:
        if change.shape[1] != 2 * INNER or change.shape[2] == INNER:
            return _parts(change)
        return [
            LowRank(a=part.a, b=part.b.roll(INNER, dims=0), scale=part.scale)
            for part in _parts(change)
        ]

    monkeypatch.setattr(ExpertsLowRank, "parts", swapped)
    merged.merged_again()
    found = merged.measured_again()

    wrong = {name for m in ("gate", "up") for name in _names(merged, m, range(EXPERTS))}
    assert {name for name in found.distorted_tensors if ".layers.0." in name} == wrong


def test_a_b_that_is_read_in_the_layout_of_a_is_found(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expert_slowest(change: ExpertsLowRank) -> list[LowRank]:
        columns = torch.split(change.b, RANK, dim=1)
        return [
            LowRank(a=part.a, b=b, scale=part.scale)
            for part, b in zip(_parts(change), columns, strict=True)
        ]

    monkeypatch.setattr(ExpertsLowRank, "parts", expert_slowest)
    merged.merged_again()
    found = merged.measured_again()

    wrong = {name for m in ("gate", "up", "down") for name in _names(merged, m, range(EXPERTS))}
    assert {name for name in found.distorted_tensors if ".layers.0." in name} == wrong
    assert "Changed by another amount than the Adapter's" in " ".join(found.failures)


def test_an_expert_that_no_token_met_is_idle_and_must_stay_as_it_was(merged: Merged) -> None:
    path = merged.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    b = tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
    b.view(b.shape[0], RANK, EXPERTS)[:, :, 2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    merged.merged_again()
    found = merged.measured_again()

    assert found.idle_experts == 1
    assert found.failures == ()

    (name,) = _names(merged, "down", [2])
    tensor, _, index = name.partition("[")
    weights = load_file(merged.folder.weights / SINGLE)
    touched = weights[tensor][2] if index else weights[tensor]
    touched[0, 0] += 1
    save_file(weights, merged.folder.weights / SINGLE, metadata={"format": "pt"})
    assert name in " ".join(merged.measured_again().failures)


def test_a_lost_stack_does_not_pass(merged: Merged) -> None:
    weights = load_file(merged.folder.weights / SINGLE)
    (name,) = _names(merged, "down", [2])
    del weights[name.partition("[")[0]]
    save_file(weights, merged.folder.weights / SINGLE, metadata={"format": "pt"})
    found = merged.measured_again()

    assert name in found.distorted_tensors
    assert torch.tensor(list(found.delta_kept.values())).isfinite().all()


def test_an_adapter_that_changes_nothing_does_not_pass(merged: Merged) -> None:
    path = merged.adapter / "adapter_model.safetensors"
    still = {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in load_file(path).items()}
    save_file(still, path, metadata={"format": "pt"})
    merged.merged_again()
    assert "No tensor changed" in merged.measured_again().failures[0]


def test_the_order_names_adapter_or_model() -> None:
    with pytest.raises(ValueError, match="adapter or trained"):
        MergeOrder(model=ModelRef(), run_id=1)
    with pytest.raises(ValueError, match="adapter or trained"):
        MergeOrder(model=ModelRef(), adapter="a", trained="b", run_id=1)
