"""All GPU benchmarks in their order, within a time limit; what was measured stays when one fails.

    python -m benchmarks.gpu.run_all [--minutes 9.5] [--only NAME ...] [--out FOLDER]
        [--device cpu --tiny]

Each is a process of its own, with a limit of its own, that writes its rows as it measures them. A
second call with the same folder goes on behind what is done; --again does it anew. Names and limits:
--list.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DONE, FAILED, CUT_OFF, NO_TIME = "done", "failed", "cut off", "no time left"
# Less is not worth the start of a process.
_LEAST_SECONDS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One process.

    Attributes:
        name: For --only.
        module: Under benchmarks.gpu.
        seconds: After which it is cut off.
        options: Of the module.
    """

    name: str
    module: str
    seconds: int
    options: tuple[str, ...] = ()


def _whole(model: str, tokens: int, seconds: int, *more: str) -> Part:
    name = "-".join(["whole", model, str(tokens), *(m.removeprefix("--") for m in more)])
    options = ("--model", model, "--tokens", str(tokens), *more)
    return Part(name=name, module="whole", seconds=seconds, options=options)


# The order is that of what is learned for the time it takes: what everything else stands on first.
PARTS = (
    Part(name="kernels", module="kernels", seconds=240),
    Part(name="grouped", module="grouped", seconds=150),
    Part(name="nf4", module="nf4", seconds=90),
    Part(name="attention", module="attention", seconds=120),
    Part(name="layer", module="layer", seconds=360),
    _whole("80b", 8192, 300, "--profile"),
    _whole("80b", 4096, 200),
    _whole("80b", 16384, 240),
    _whole("80b", 8192, 300, "--experts"),
    _whole("80b", 32768, 300),
    _whole("9b", 8192, 200),
    _whole("27b", 4096, 240),
    _whole("35b", 8192, 200),
    _whole("122b", 4096, 300),
    Part(
        name="trl-80b", module="stock", seconds=420,
        options=("--model", "80b", "--tokens", "4096", "--lengths", "one"),
    ),
    _whole("80b", 4096, 200, "--lengths", "one"),
    Part(
        name="trl-9b", module="stock", seconds=240,
        options=("--model", "9b", "--tokens", "4096", "--lengths", "one"),
    ),
    _whole("9b", 4096, 200, "--lengths", "one"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left; return 1 when something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="build/gpu", help="folder for the JSON files")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all of them together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--list", action="store_true", help="names and limits, then end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the code only")
    given = parser.parse_args(argv)
    parts = [part for part in PARTS if given.only is None or part.name in given.only]
    if given.list:
        for part in parts:
            print(f"{part.name:28} {part.seconds:4} s  {part.module} {' '.join(part.options)}")
        return 0
    passed_on = ["--out", given.out, "--device", given.device, *(["--tiny"] * given.tiny)]
    log = Path(given.out) / "run_all.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = set() if given.again else already_done(log)
    return run(
        [part for part in parts if part.name not in done], passed_on, log, 60 * given.minutes
    )


def already_done(log: Path) -> set[str]:
    """Return the names of the parts that ended well in earlier calls."""
    if not log.exists():
        return set()
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {entry["name"] for entry in entries if entry["ended"] == DONE}


def run(parts: Sequence[Part], passed_on: Sequence[str], log: Path, seconds: float) -> int:
    """Run some parts one after the other, and print how each ended.

    Args:
        parts: What to run.
        passed_on: Options that all of them get.
        log: Where how they ended is added, a line each.
        seconds: Of all of them together.
    """
    until = time.monotonic() + seconds
    ended: dict[str, str] = {}
    for part in parts:
        left = until - time.monotonic()
        start = time.monotonic()
        print(f"\n==== {part.name}", flush=True)
        how = NO_TIME if left < _LEAST_SECONDS else _run(part, passed_on, min(part.seconds, left))
        ended[part.name] = how
        took = round(time.monotonic() - start, 1)
        with log.open("a", encoding="utf-8") as file:
            line = {"name": part.name, "ended": how, "seconds": took, "options": part.options}
            file.write(json.dumps(line) + "\n")
    print("\n" + "\n".join(f"{name:28} {how}" for name, how in ended.items()), flush=True)
    return int(any(how != DONE for how in ended.values()))


def _run(part: Part, passed_on: Sequence[str], seconds: float) -> str:
    command = [sys.executable, "-m", f"benchmarks.gpu.{part.module}", *part.options, *passed_on]
    process = subprocess.Popen(command)
    try:
        return DONE if process.wait(timeout=seconds) == 0 else FAILED
    except subprocess.TimeoutExpired:
        return CUT_OFF
    finally:
        # Also when this one is stopped by hand: the card must be free for the next.
        if process.poll() is None:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
