"""Print what the soak tests have found: `python -m tests.soak`, after `make soak`."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tests.soak.report import OUTPUT

CHAOS = (
    "chaos | runs | kill -9 | SIGSTOP | broker | finished | stopped | lost | twice | wrong points"
    " | overlaps run/slot | refused | tries | recovery s, kill p50/p95/max | kill, nobody paused | pause p50/max"
).split(" | ")
METRICS = "metrics | seconds | steps | missing | lag s p50/p99/max | look s p50/p95 | worker MiB | files".split(
    " | "
)


def main() -> int:
    """Print two tables in Markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(OUTPUT.glob("*.json"))}
    chaos = [_chaos(name, values) for name, values in found.items() if "told" in values]
    metrics = [_metrics(name, values) for name, values in found.items() if "lag" in values]
    _print(CHAOS, chaos)
    _print(METRICS, metrics)
    return 0


def _print(head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        sys.stdout.write(f"| {' | '.join(str(cell) for cell in row)} |\n")
    sys.stdout.write("\n")


def _chaos(name: str, values: dict[str, Any]) -> list[object]:
    blows, states, recovery = values["blows"], values["states"], values["recovery"]
    return [
        name,
        values["told"]["runs"],
        *[blows.get(kind, 0) for kind in ("kill", "pause", "broker")],
        states["FINISHED"],
        states["STOPPED"],
        *[len(values[fault]) for fault in ("lost", "finished_twice", "wrong_points")],
        f"{len(values['overlaps_of_runs'])}/{len(values['overlaps_of_slots'])}",
        values["refused"],
        values["tries"],
        _of(recovery["kill"], ("p50", "p95", "max")),
        _of(recovery["kill alone"], ("p50", "p95", "max")),
        _of(recovery["pause"], ("p50", "max")),
    ]


def _metrics(name: str, values: dict[str, Any]) -> list[object]:
    return [
        name,
        values["seconds"],
        values["points"],
        sum(values["missing"].values()),
        _of(values["lag"], ("p50", "p99", "max")),
        _of(values["watching"], ("p50", "p95")),
        " to ".join(str(mib) for mib in values["worker_mib"]),
        " to ".join(str(count) for count in values["worker_files"]),
    ]


def _of(spread: dict[str, float], names: Iterable[str]) -> str:
    return " / ".join(f"{spread[name]:.1f}" if name in spread else "-" for name in names)


if __name__ == "__main__":
    sys.exit(main())
