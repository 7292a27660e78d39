"""`studio budget`: what a run would need of each card, without a card."""

from pathlib import Path
from typing import Annotated

import typer

from studio import terminal
from studio.domain.spec import JobSpec
from studio.errors import InputError
from studio.options import USER_ERROR, HomeOption, JsonOption, studio_of
from studio.services import budgets, runs
from studio.services.studio import Studio
from studio.terminal import err, out, say_json

_BAR_WIDTH = 40


def budget(
    what: Annotated[
        str, typer.Argument(metavar="PRESET|SPEC.yaml", help="A preset, or a JobSpec as YAML.")
    ],
    card: Annotated[
        float | None,
        typer.Option(help="Memory of a card in GiB, 1 to 10,000; by default this machine's."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would need of each card, and which layers it would recompute."""
    studio = studio_of(home)
    spec = _spec_of(studio, what)
    found = budgets.budget_of(studio, spec, card)
    if found is None:
        raise InputError(
            f"The model {spec.model.id} is not known here yet.",
            "Give the path of its folder, or download its config.json first.",
            field="model.id",
        )
    if card is not None and found.card is None:
        err.print("--card is ignored: this run is on the CPU.", markup=False)
    if as_json:
        say_json(found.to_values())
    else:
        _show(found)
    if found.fits is False:
        raise typer.Exit(USER_ERROR)


def _spec_of(studio: Studio, what: str) -> JobSpec:
    path = Path(what)
    if path.suffix not in (".yaml", ".yml"):
        return runs.spec_from_preset(studio, what, {})
    return runs.spec_from_file(studio, path)


def _show(found: budgets.Estimate) -> None:
    total = found.budget.total_bytes
    rows = []
    for part in found.budget.parts:
        share = part.num_bytes / max(1, total)
        percent = f"{share:.0%}"
        bar = "" if percent == "0%" else "#" * max(1, round(_BAR_WIDTH * share))
        rows.append((part.title, f"{part.num_bytes / 2**30:.2f}", percent, bar))
    rows.append(("Total", f"{total / 2**30:.2f}", "", ""))
    terminal.show_table(("part", "GiB", "share", ""), rows)
    out.print(budgets.verdict(found), markup=False)
    if found.card is not None:
        out.print(f"Compared with {found.card.title}.", markup=False)
    for words in (found.reason, found.hint):
        if words:
            (err if found.problem else out).print(words, markup=False)
