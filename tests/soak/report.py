"""What has become of the Runs of a chaos: told from audit, files and database."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from studio.disk import Home, write_whole
from studio.domain.run import RunState
from studio.services.studio import Studio
from studio.store import events
from studio.store.rows import PointRow, RunRow
from tests.soak import audit

OUTPUT = Path(__file__).resolve().parents[2] / "test-output" / "soak"
REFUSED = re.compile(
    r"is lost; its process is killed|held by another worker|was lost: nothing is done"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blow:
    """One thing that was done to a worker or a broker, and a Run that the worker had then.

    Attributes:
        kind: "kill", "pause" or "broker".
        at: Seconds since the machine was started.
        run: The Run; 0 stands for the blow itself.
        epoch: Of its Lease.
        seconds: How long a pause lasts.
    """

    kind: str
    at: float
    run: int
    epoch: int
    seconds: float = 0.0


@dataclass(kw_only=True, slots=True)
class Report:
    """How a chaos ended; each list names what is wrong.

    Attributes:
        told: What was planned and measured from outside.
        blows: How often each kind of blow was given.
        states: How many Runs ended in each state.
        lost: Runs that are neither finished nor stopped because somebody asked.
        finished_twice: Runs that said more than once that they finished.
        wrong_points: Runs whose Curve is not exactly what their last try measured.
        overlaps_of_runs: Pairs of trainers of one Run that were alive together.
        overlaps_of_slots: Pairs of trainers on one card that were alive together.
        stops_ignored: Runs that went on long after somebody had asked them to stop.
        tries: Trainers that were allowed to begin.
        refused: Stale Leases that were refused a write, as workers and trainers say.
        recovery: Seconds from a blow until a trainer with a later Lease works: p50, p95, max. Those
            of kills are told once more by themselves where no worker stood still meanwhile: one
            that is stopped while it writes holds up all others on SQLite.
    """

    told: dict[str, Any]
    blows: dict[str, int]
    states: dict[str, int]
    lost: list[str]
    finished_twice: list[int]
    wrong_points: list[str]
    overlaps_of_runs: list[str]
    overlaps_of_slots: list[str]
    stops_ignored: list[int]
    tries: int
    refused: int
    recovery: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def faults(self) -> dict[str, Any]:
        """What must be empty, where it is not."""
        found: dict[str, Any] = {
            "lost": self.lost,
            "finished twice": self.finished_twice,
            "wrong points": self.wrong_points,
            "overlaps of runs": self.overlaps_of_runs,
            "overlaps of slots": self.overlaps_of_slots,
            "stops ignored": self.stops_ignored,
            "orphans": self.told.get("orphans"),
            "ends of workers that nobody asked for": self.told.get("unasked_ends_of_workers"),
        }
        return {name: value for name, value in found.items() if value}

    def save(self, name: str) -> None:
        """Keep it for whoever reads the table."""
        OUTPUT.mkdir(parents=True, exist_ok=True)
        write_whole(OUTPUT / f"{name}.json", json.dumps(asdict(self), indent=2) + "\n")


def judge(
    studio: Studio,
    *,
    audit_file: Path,
    logs: Sequence[Path],
    blows: Sequence[Blow],
    stops: Mapping[int, float],
    told: dict[str, Any],
) -> Report:
    """Compare what trainers did with what the studio knows."""
    lines = audit.read(audit_file)
    trainers = audit.lives(lines)
    with studio.database.read() as session:
        rows = session.query(RunRow).order_by(RunRow.id).all()
        points: dict[int, dict[int, float]] = {row.id: {} for row in rows}
        for point in session.query(PointRow).filter(PointRow.name == "loss"):
            points[point.run_id][point.step] = point.value
        ends = {
            row.id: [e.kind for e in events.of(session, RunRow, row.id)].count("finished")
            for row in rows
        }
    said = audit.finished(lines)
    counts = [blow.kind for blow in blows if not blow.run]
    refusals = sum(len(REFUSED.findall(path.read_text(errors="replace"))) for path in logs)
    return Report(
        told=told,
        blows={kind: counts.count(kind) for kind in sorted(set(counts))},
        states={state: sum(row.state == state for row in rows) for state in RunState},
        lost=[_words(row) for row in rows if not _is_well(row, stops)],
        finished_twice=[row.id for row in rows if max(said.get(row.id, 0), ends[row.id]) > 1],
        wrong_points=[wrong for row in rows if (wrong := _wrong(studio.home, row, points[row.id]))],
        overlaps_of_runs=[_pair(*two) for two in audit.overlaps(trainers, lambda a: a.run)],
        overlaps_of_slots=[_pair(*two) for two in audit.overlaps(trainers, lambda a: a.slot)],
        stops_ignored=_ignored(trainers, stops, float(told["lease_seconds"])),
        tries=len(trainers),
        refused=refusals + sum(line.kind == audit.FENCED for line in lines),
        recovery=_recoveries(trainers, blows),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the number of values, their median, 95th and 99th percentile, and the greatest."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    parts = {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": round(ordered[-1], 3)}
    return {"count": len(ordered), **parts}


def _is_well(row: RunRow, stops: Mapping[int, float]) -> bool:
    return row.state == RunState.FINISHED or (row.state == RunState.STOPPED and row.id in stops)


def _words(row: RunRow) -> str:
    return f"run {row.id} is {row.state}, epoch {row.epoch}, step {row.step}: {row.error}"


def _wrong(home: Home, row: RunRow, stored: Mapping[int, float]) -> str:
    """Return what is wrong with a Curve: it must be what the last try left in its file."""
    file = home.run(row.id).metrics
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]
    measured = {record["step"]: record["values"]["loss"] for record in records}
    end = (row.result or {}).get("step", len(measured))
    missing = sorted(set(range(1, end + 1)) - stored.keys())
    extra = sorted(stored.keys() - set(range(1, end + 1)))
    other = sorted(
        step for step in stored.keys() & measured.keys() if stored[step] != measured[step]
    )
    if len(records) != len(measured):
        return f"run {row.id} has steps twice in its file"
    if missing or extra or other:
        return f"run {row.id}, epoch {row.epoch}: missing {missing}, extra {extra}, other {other}"
    return ""


def _pair(one: audit.Life, two: audit.Life) -> str:
    both = (one.end - two.begin) / 1e9
    return (
        f"run {one.run} epoch {one.epoch} and run {two.run} epoch {two.epoch} on {one.slot} and "
        f"{two.slot}: {both:.3f} s"
    )


def _ignored(
    trainers: Sequence[audit.Life], stops: Mapping[int, float], lease_seconds: float
) -> list[int]:
    late = {run: asked + 3 * lease_seconds + 5 for run, asked in stops.items()}
    return sorted(
        {life.run for life in trainers if life.run in late and life.end / 1e9 > late[life.run]}
    )


def _recoveries(
    trainers: Sequence[audit.Life], blows: Sequence[Blow]
) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {"kill": [], "pause": [], "kill alone": []}
    pauses = [(blow.at, blow.at + blow.seconds) for blow in blows if blow.seconds]
    for blow in blows:
        begun = audit.begun_after(trainers, blow.run, blow.epoch) if blow.run else None
        if begun is None:
            continue  # it stands for no Run, or the Run was over, or stopped
        until = begun / 1e9
        found[blow.kind].append(until - blow.at)
        if blow.kind == "kill" and not any(a < until and blow.at < b for a, b in pauses):
            found["kill alone"].append(until - blow.at)
    return {kind: spread(seconds) for kind, seconds in found.items()}
