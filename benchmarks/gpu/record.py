"""What a GPU benchmark finds: a table on the terminal, and a line of JSON for each row in a file.

Each row is written when it is measured, so that a run that is cut off keeps what it had. The first
line of a run names machine, versions and settings; the others carry its `sitting`.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "fla-core",
    "flash-linear-attention", "liger-kernel", "trl",
)  # fmt: skip
_CARD = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
OUT_OF_MEMORY = "out of memory"
_LEAST_WIDTH = 8
_WIDTHS = {"models": 20, "kernel": 16, "documents": 12, "product": 16, "side": 26}


class Record:
    """One run of one script.

    Args:
        script: Its name; rows are added to `SCRIPT.jsonl` in the folder --out.
        given: What `arguments` parsed.

    Attributes:
        device: Where it is measured.
        is_tiny: Whether shapes are tiny: the same code, to try it.
        is_timed: Whether times mean anything: on a CPU none is taken.
        failures: Rows whose results were wrong, or that broke.
    """

    def __init__(self, script: str, given: argparse.Namespace) -> None:
        # With its number, as Accelerate gives it to the engine.
        self.device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no CUDA GPU here; --device cpu --tiny tries the code.")
        self.is_tiny: bool = given.tiny
        self.is_timed = self.device.type == "cuda"
        self.failures = 0
        self.sitting = time.strftime("%Y%m%d-%H%M%S")
        self._script, self._part = script, ""
        self._path = Path(given.out) / f"{script}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in vars(given).items()}
        self._write("machine", {**machine(self.device), "settings": settings, "argv": sys.argv[1:]})

    @property
    def dtype(self) -> torch.dtype:
        """What the engine computes in on this device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def row(self, part: str, **values: Any) -> None:
        """Print a row and add it to the file; a row that `passed` is False of is a failure."""
        shown = {name: _text(value) for name, value in values.items() if not _is_long(value)}
        if part != self._part:
            print(f"\n{part}\n" + _line(shown, shown))
            self._part = part
        print(_line(shown, shown.values()), flush=True)
        self.failures += values.get("passed") is False
        self._write(part, values)

    def attempt(self, part: str, act: Callable[[], None], **settings: Any) -> str:
        """Measure something; when it breaks, that is the row. Returns how it broke, or nothing."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            note = self._broken(act)
        said = sorted({str(warning.message).partition("\n")[0][:200] for warning in warned})
        if self.device.type == "cuda":
            # Outside the handler, whose exception would keep tensors alive.
            gc.collect()
            torch.cuda.empty_cache()
        for text in (note, *said):
            if text:
                print(f"  {part}, {', '.join(map(str, settings.values()))}: {text}", flush=True)
        if note or said:
            self._write(part, {**settings, "broke": note, "warned": said})
        return note

    def _broken(self, act: Callable[[], None]) -> str:
        """Do something; return how it broke, or nothing."""
        try:
            act()
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        # From a missing symbol to a failed compilation: the finding is that it does not work.
        except Exception as error:  # noqa: BLE001
            self.failures += 1
            first = (str(error).strip().splitlines() or [""])[0][:300]
            return f"{type(error).__name__}: {first}"
        return ""

    def exit_code(self) -> int:
        """Return 1 when a result was wrong or something broke (no memory is a finding), else 0."""
        if not self.is_timed:
            print("\nTried on a CPU: nothing was timed.")
        return int(self.failures > 0)

    def _write(self, part: str, values: dict[str, Any]) -> None:
        line = {"script": self._script, "part": part, "sitting": self.sitting, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


def arguments(description: str | None, device: str = "cuda") -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", default="build/gpu", help="folder for the JSON files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the code only")
    return parser


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and refuse real shapes on a CPU, where they would take hours."""
    given = parser.parse_args(argv)
    if given.device == "cpu" and not given.tiny:
        parser.error("on a CPU only --tiny runs")
    return given


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on: the card and the versions."""
    card: dict[str, str] = {}
    if device.type == "cuda":
        said = _ask_card()
        card = dict(zip(_CARD, said, strict=True)) if len(said) == len(_CARD) else {}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "card": card,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _ask_card() -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [part.strip() for part in found.stdout.split(",")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(names: Iterable[str], texts: Iterable[str]) -> str:
    widths = (_WIDTHS.get(name, max(len(name), _LEAST_WIDTH)) for name in names)
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _is_long(value: object) -> bool:
    return isinstance(value, dict | list | tuple) or (isinstance(value, str) and len(value) > 60)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
