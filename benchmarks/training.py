"""Training a LoRA on chats, on one core: the engine against TRL's SFTTrainer.

    python benchmarks/training.py [--families qwen3.5 qwen3-next] [--experts] [--rounds 6]

TRL is no dependency of the studio: `pip install trl==1.16.0` (best with --no-deps, into an
environment of its own that sees this one's packages).

Both train the same tiny model from the same adapter on the same tokens, in float32, with the same
optimizer and schedule, recomputing nothing. The chats are made up; their lengths are log-normal
(mean 600 tokens, sigma 0.8, cut at 2,048), and the answers, 30 % of the tokens, are trained. Each
side is a process of its own; they take steps in turns, so that a change of the machine's pace meets
all. Counted are real tokens, never padding. First the gate: on the same examples every side gives
the same loss (1e-4) and the same gradients of the adapter (cosine 0.999, norm 1e-3).

`--experts` puts a LoRA on the routed experts too, where a family has them. The goal is judged by
time on the processor; the ratio by the wall stands beside it.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chat_lengths import LONGEST, chats, store  # noqa: E402  # the line above finds it
from studio.disk import TEMPLATES, Home, RunFolder  # noqa: E402
from studio.domain.preset import load_models  # noqa: E402
from studio.domain.spec import JobSpec, parse_spec  # noqa: E402

FAMILIES = ("qwen3.5", "qwen3.5-moe", "qwen3-next")
ALL_FAMILIES = (*FAMILIES, "qwen3", "qwen3-moe")
GOAL = 2.0
BASELINE = "TRL"
# For TRL: what differs from the settings in training_sides.py. For ours: the batch.
SIDES: dict[str, dict[str, Any]] = {
    "ours, packed, rows of 4,096": {"packing": True, "micro_batch_size": 2},
    "ours, packed, rows of 16,384": {"packing": True},
    "ours, padded": {"packing": False},
    BASELINE: {"trl": {}},
    "TRL, group_by_length": {"trl": {"train_sampling_strategy": "group_by_length"}},
    "TRL, recomputing (its default)": {"trl": {"gradient_checkpointing": True}},
    "TRL, packing": {"trl": {"packing": True}},
    "TRL, packing, 2 rows": {"trl": {"packing": True, "per_device_train_batch_size": 2}},
}
VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


# ---- sides ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Side:
    """A process that takes steps when it is told to."""

    name: str
    process: subprocess.Popen[str]
    steps: int
    rounds: list[dict[str, float]] = field(default_factory=list)
    refused: str = ""

    def ask(self, command: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a command; return the answer, which is the first one of all without a command."""
        if command is not None and self.process.poll() is None:
            _pipe(self.process.stdin).write(json.dumps(command) + "\n")
            _pipe(self.process.stdin).flush()
        line = _pipe(self.process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}; see above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            _pipe(self.process.stdin).close()
        self.process.wait()

    def total(self, key: str) -> float:
        """Return a sum over all rounds."""
        return sum(found[key] for found in self.rounds)

    def rate(self, clock: str) -> float:
        """Return real tokens a second over all rounds."""
        return self.total("tokens") / self.total(clock)

    def spread(self) -> tuple[float, float]:
        """Return the least and the greatest rate of a round, on the processor."""
        rates = [found["tokens"] / found["cpu"] for found in self.rounds]
        return min(rates), max(rates)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def start(name: str, given: Mapping[str, Any], steps: int) -> Side:
    """Start a side and wait until it is ready; it will take so many steps in a round."""
    environment = (
        *("HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error", "PYTHONWARNINGS=ignore"),
        *("OMP_NUM_THREADS=1", f"HF_HOME={given['folder']}/hf"),
        # glibc returns large tensors to the system, and each new one is cleared again: a quarter
        # of the time of wide batches, on either side, that other allocators do not take.
        *("MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=68719476736"),
    )
    script = ROOT / "benchmarks" / "training_sides.py"
    process = subprocess.Popen(
        ["env", *environment, sys.executable, str(script), json.dumps(given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    side = Side(name=name, process=process, steps=steps)
    print(f"  {name}: {side.ask(None)['note']}", file=sys.stderr, flush=True)
    return side


def spec_of(family: str, dataset: Path, batch: Mapping[str, Any], *, experts: bool) -> JobSpec:
    """Return what both sides train."""
    config = load_models(TEMPLATES / "models")[f"tiny/{family}"].config
    has_delta_net = "linear_num_key_heads" in config
    targets = ["attention"] + ["delta_net"] * has_delta_net
    if "num_experts" not in config:
        targets.append("dense_mlp")
    elif experts:
        targets.append("routed_experts")
    return parse_spec(
        {
            "method": "lora",
            "model": {"id": f"tiny/{family}"},
            "data": {"dataset": dataset.stem, "max_length_tokens": LONGEST},
            "lora": {"rank": 16, "alpha": 32, "targets": targets},
            "batch": {"micro_batch_size": 8, "gradient_accumulation_steps": 1, **batch},
            "train": {"epochs": 100, "max_steps": 1000, "recompute": "none"},
        }
    )


def make_run(home: Home, spec: JobSpec, dataset: Path) -> RunFolder:
    """Make the folder of a run, as the studio does."""
    run = home.run(len(list(home.runs.iterdir())) + 1)
    run.path.mkdir()
    run.spec.write_text(spec.model_dump_json(), encoding="utf-8")
    run.dataset.symlink_to(dataset)
    return run


# ---- gate and measurement ---------------------------------------------------------------------


def gate(sides: Sequence[Side], folder: Path) -> list[Side]:
    """Compare loss and gradients of all sides; return those that can train what is asked.

    Raises:
        SystemExit: One of them trains something else.
    """
    lengths = np.load(folder / "examples.npz")["lengths"]
    # Short and long ones; the longest two would only take time.
    examples = np.argsort(lengths)[np.linspace(0, len(lengths) - 3, 6).astype(int)].tolist()
    agreeing, expected = list[Side](), dict[str, np.ndarray]()
    first_loss = 0.0
    for side in sides:
        path = folder / "gradients.safetensors"
        answer = side.ask({"act": "gate", "examples": examples, "path": str(path)})
        if "refused" in answer:
            side.refused = answer["refused"].splitlines()[0]
            continue
        found = load_file(path)
        if not expected:
            expected, first_loss = found, answer["loss"]
        difference = abs(answer["loss"] - first_loss)
        least_cosine, worst_norm = likeness(found, expected)
        print(
            f"  gate, {side.name}: loss {answer['loss']:.6f}, gradients: least cosine "
            f"{least_cosine:.7f}, norms within {worst_norm:.1e}"
        )
        if not (difference < 1e-4 and least_cosine > 0.999 and worst_norm < 1e-3):
            raise SystemExit(f"{side.name} trains something else than {sides[0].name}.")
        agreeing.append(side)
    return agreeing


def likeness(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Return the least cosine between gradients of a name, and the worst difference in norm.

    Raises:
        SystemExit: They are not of the same layers.
    """
    if found.keys() != expected.keys():
        raise SystemExit(f"Gradients of one side alone: {sorted(found.keys() ^ expected.keys())}.")
    cosines, norms = [], []
    for name, one in expected.items():
        a, b = (each.astype(np.float64).ravel() for each in (one, found[name]))
        norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
        cosines.append(float(a @ b / (norm_a * norm_b)))
        norms.append(float(abs(norm_b / norm_a - 1)))
    return min(cosines), max(norms)


def measure(sides: Sequence[Side], rounds: int) -> None:
    """Let all sides take steps in turns."""
    for _ in range(rounds):
        for side in sides:
            # Not counted: it gets the memory that was given back while the others took theirs.
            side.ask({"act": "step", "steps": 1, "rests": False})
            found = side.ask({"act": "step", "steps": side.steps, "rests": True})
            side.rounds.append({**found, "steps": side.steps})


def table(sides: Sequence[Side]) -> float:
    """Print a table; return the ratio that the goal is about."""
    base = next(side for side in sides if side.name == BASELINE)
    header = ("", "real tokens/s", "of the rounds", "real share", "tokens a step", "peak MiB")
    print(f"\n| {' | '.join((*header, 'times TRL', 'by the wall'))} |\n|{'---|' * 8}")
    for side in sides:
        if side.refused:
            print(f"| {side.name} | cannot: {side.refused} |" + " |" * 6)
            continue
        low, high = side.spread()
        cells = (
            f"{side.rate('cpu'):,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{side.total('tokens') / side.total('slots'):.0%}",
            f"{side.total('tokens') / side.total('steps'):,.0f}",
            f"{max(found['peak'] for found in side.rounds):,.0f}",
            f"{side.rate('cpu') / base.rate('cpu'):.2f}",
            f"{side.rate('wall') / base.rate('wall'):.2f}",
        )
        print(f"| {side.name} | {' | '.join(cells)} |")
    return sides[0].rate("cpu") / base.rate("cpu")


def compare(home: Home, family: str, names: Sequence[str], given: argparse.Namespace) -> float:
    """Measure one family."""
    from workers.engine.model import find_base  # takes seconds

    spec = spec_of(family, Path(), {}, experts=given.experts)
    base = find_base(spec.model, home)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    dataset = store(home, list(chats(tokenizer, given.chats, seed=0)))
    folder = home.path / f"{family}-{given.experts}"
    folder.mkdir()
    shared = {"folder": str(folder), "model": str(base), "is_moe": family.endswith(("moe", "next"))}
    print(f"\n### {family}, LoRA rank 16 on {', '.join(spec.lora.targets)}", flush=True)
    with ExitStack() as stack:
        sides = []
        for name in names:
            settings = dict(SIDES[name])
            trl = {"trl": settings.pop("trl")} if "trl" in settings else {}
            spec = spec_of(family, dataset, settings, experts=given.experts)
            run = {} if trl else {"run": str(make_run(home, spec, dataset).path)}
            whole = {**shared, **trl, **run, "spec": spec.model_dump(mode="json")}
            # A full row is as long as several padded micro-batches.
            is_long = settings.get("packing") and spec.batch.micro_batch_size == 8
            sides.append(start(name, whole, 1 if is_long else given.steps))
            stack.callback(sides[-1].close)
        kept = np.load(folder / "examples.npz")
        lengths, share = kept["lengths"], kept["mask"].mean()
        print(
            f"  {len(lengths)} chats, mean {lengths.mean():.0f} tokens, median "
            f"{np.median(lengths):.0f}, longest {lengths.max()}, {share:.0%} trained"
        )
        measure(gate(sides, folder), given.rounds)
        return table(sides)


def main() -> None:
    """Measure all families and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=ALL_FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--experts", action="store_true", help="LoRA on the routed experts, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--chats", type=int, default=1600)
    given = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is missing, which this compares with: pip install trl==1.16.0")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    print(f"Python {platform.python_version()}, {versions}; one core of {cpu}")
    with tempfile.TemporaryDirectory() as name:
        home = Home(path=Path(name))
        home.create()
        # Ours comes first: it writes down what the others train. TRL is what all are divided by.
        needed = {next(iter(SIDES)), BASELINE, *given.sides}
        for family in given.families:
            ratio = compare(home, family, [name for name in SIDES if name in needed], given)
            print(f"goal of {GOAL:g} for {family}: {'met' if ratio >= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
