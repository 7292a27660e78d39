"""What a run would need, asked for a preset or a spec, with this machine's cards or a named one."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from studio.budget_commands import budget
from studio.domain.budget import GIB
from studio.domain.spec import JobSpec, parse_spec
from studio.errors import InputError
from studio.services import budgets, runs
from studio.services.studio import Studio

DENSE = "qwen3.5-27b-qlora"


def preset(studio: Studio, name: str = DENSE, **changes: object) -> JobSpec:
    return runs.spec_from_preset(studio, name, changes)


def found(studio: Studio, spec: JobSpec, card_gib: float | None = None) -> budgets.Estimate:
    estimate = budgets.budget_of(studio, spec, card_gib)
    assert estimate is not None
    return estimate


def test_a_card_that_is_large_enough_recomputes_as_little_as_it_may(studio: Studio) -> None:
    small, large = (found(studio, preset(studio), gib) for gib in (40, 141))
    assert small.fits is True
    assert large.fits is True
    assert len(small.budget.recomputed) > len(large.budget.recomputed) == 0
    assert budgets.verdict(small).endswith(f"and fits, {small.budget.plan}.")
    assert "of the 40.0 GiB of the card" in budgets.verdict(small)


def test_a_card_that_is_too_small_is_said_with_what_would_fit(studio: Studio) -> None:
    tight = found(studio, preset(studio, batch={"micro_batch_size": 16}), 32)
    assert tight.fits is False
    assert tight.problem == budgets.verdict(tight)
    assert tight.hint.startswith("Set the micro-batch to ")
    assert len(tight.budget.recomputed) == tight.budget.num_layers


def test_method_auto_says_why(studio: Studio) -> None:
    auto = preset(studio, method="auto")
    assert found(studio, auto, 141).budget.method == "lora"
    assert found(studio, auto, 40).reason.startswith("The base goes to 4 bits")
    too_small = found(studio, auto, 12)
    assert too_small.fits is False
    assert too_small.budget.method == "qlora"


def test_without_a_card_the_memory_that_the_preset_names_is_taken(studio: Studio) -> None:
    if budgets.cards_here():
        pytest.skip("this machine has cards of its own")
    named = studio.presets[DENSE].needs.gpu_memory_gib
    assert named is not None
    card = found(studio, preset(studio)).card
    assert card is not None
    assert card.memory_bytes == round(named * GIB)
    assert "preset names" in card.title
    nothing = found(studio, preset(studio).model_copy(update={"preset": ""}))
    assert (nothing.card, nothing.fits) == (None, None)


def test_a_cpu_has_no_card(studio: Studio) -> None:
    tiny = found(studio, preset(studio, "tiny-qwen3.5"), 40)
    assert (tiny.card, tiny.fits, tiny.budget.cards) == (None, None, 0)
    assert "of the machine" in budgets.verdict(tiny)


def test_a_model_that_nobody_has_seen_has_no_budget(studio: Studio) -> None:
    assert budgets.budget_of(studio, parse_spec({"model": {"id": "nobody/has-this"}})) is None


def test_wrong_targets_are_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="routed_experts matches nothing"):
        found(studio, preset(studio, lora={"targets": ["routed_experts"]}), 80)


# ---- the command ------------------------------------------------------------------------------


def run(home: Path, *arguments: str) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.command()(budget)
    answer = CliRunner().invoke(app, [*arguments, "--home", str(home)])
    return answer.exit_code, answer.output, answer.exception


def test_the_command_speaks_json(studio: Studio) -> None:
    code, said, _ = run(studio.home.path, DENSE, "--card", "80", "--json")
    values: dict[str, Any] = json.loads(said)
    assert code == 0
    assert values["fits"] is True
    assert values["total_bytes"] == sum(values["parts"].values()) <= 80 * GIB
    assert values["recomputed_layers"] == []


@pytest.mark.parametrize("card", ["0", "-1", "10001", "1e30", "inf", "nan"])
def test_a_card_that_cannot_be_is_refused_in_words(studio: Studio, card: str) -> None:
    _, _, error = run(studio.home.path, DENSE, "--card", card)
    assert isinstance(error, InputError)
    assert "from 1 to 10,000" in str(error)


def test_the_command_says_what_is_compared(studio: Studio) -> None:
    _, said, _ = run(studio.home.path, DENSE, "--card", "80")
    assert "Compared with a card of 80 GiB." in said
    if not budgets.cards_here():
        assert "Compared with the memory that the preset names." in run(studio.home.path, DENSE)[1]
    code, ignored, _ = run(studio.home.path, "tiny-qwen3.5", "--card", "80")
    assert code == 0
    assert "--card is ignored: this run is on the CPU." in ignored
    assert "Compared" not in ignored


def test_no_bar_stands_beside_0_percent(studio: Studio) -> None:
    _, said, _ = run(studio.home.path, DENSE, "--card", "80")
    bars = {line.count("#") for line in said.splitlines() if " 0%" in line}
    assert bars <= {0}
    assert "#" in said


def test_the_command_exits_2_where_nothing_fits(studio: Studio) -> None:
    code, said, _ = run(studio.home.path, DENSE, "--card", "10")
    assert code == 2
    assert "but the card has 10.0 GiB" in said
    assert "Weights" in said


def test_the_command_reads_a_spec_from_a_file(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"preset: {DENSE}\nbatch: {{micro_batch_size: 2}}\n", encoding="utf-8")
    code, said, _ = run(studio.home.path, str(path), "--card", "80", "--json")
    assert code == 0
    assert json.loads(said)["tokens"] == 4096
    _, _, error = run(studio.home.path, str(tmp_path / "nothing.yaml"))
    assert isinstance(error, InputError)
    assert "There is no file" in str(error)
