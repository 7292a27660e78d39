"""Try every fast kernel on this device before a run depends on it.

fla's backward of the gated delta rule refuses Hopper cards with Triton 3.4.0 to 3.7.0, because one
of its tile sizes is compiled wrongly there (https://github.com/fla-org/flash-linear-attention/issues/640).
Heads of 128, as all models of the family have, never use that tile; so the refusal is lifted, the
gradients are compared with plain arithmetic on this very card, and it is put back if they differ.
"""

import importlib
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import bitsandbytes
import torch
from torch.nn import functional

from studio.domain.architecture import Architecture, Mixer
from studio.domain.kernels import Kernel, Kernels
from studio.domain.proof import Proof
from studio.domain.spec import JobSpec
from studio.errors import EngineError
from workers.engine import kernel_speed, self_tests

_ONLY_CUDA = "used on CUDA GPUs only; the plain form runs here"
_TITLES = {
    "delta_rule": ("Gated DeltaNet", "fla-core"),
    "convolution": ("Convolution of the delta net", "fla-core"),
    "attention": ("Attention over packed documents", "torch"),
    "grouped_matmul": ("Matrix products of experts", "torch"),
    "nf4": ("4-bit weights", "bitsandbytes"),
}
# Of these the plain form is many times slower on a GPU; the others have no plain form.
_SLOW_WITHOUT = ("delta_rule",)


def preflight(device: torch.device) -> Kernels:
    """Try all kernels on a device.

    Args:
        device: Where the run will be.
    """
    start = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tries: dict[str, Callable[[torch.device, torch.dtype], float]] = {
        "delta_rule": lambda *where: self_tests.delta_rule_error(_delta_rule(), *where),
        "convolution": lambda *where: self_tests.convolution_error(_convolution(), *where),
        "attention": lambda *where: self_tests.attention_error(_attention(), *where),
        "grouped_matmul": lambda *where: self_tests.grouped_matmul_error(_grouped_matmul(), *where),
        "nf4": _try_nf4,
    }
    on_cpu = ("grouped_matmul", "nf4")
    kernels = tuple(
        _kernel(name, test, device, dtype)
        if device.type == "cuda" or name in on_cpu
        else _unused(name, _ONLY_CUDA)
        for name, test in tries.items()
    )
    return Kernels(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        versions=_versions(),
        kernels=kernels,
        seconds=time.monotonic() - start,
    )


def needed_by(spec: JobSpec, architecture: Architecture) -> frozenset[str]:
    """Return the names of the kernels that a run calls where the device has them.

    Args:
        spec: Its method auto may turn out to be qlora, so it needs what qlora does.
        architecture: Of the base.
    """
    has_delta_net = any(layer.mixer is Mixer.DELTA_NET for layer in architecture.layers)
    packs = spec.batch.packing
    needs = {
        "delta_rule": has_delta_net,
        # Rows that are not packed go to transformers, which does not call fla's convolution.
        "convolution": has_delta_net and packs,
        "attention": packs,
        "grouped_matmul": architecture.experts is not None,
        "nf4": spec.method in ("qlora", "auto"),
    }
    return frozenset(name for name, is_needed in needs.items() if is_needed)


def refuse_unfit(kernels: Kernels, *, needed: frozenset[str], accept_slow: bool) -> None:
    """Stop a run that would compute wrongly, or many times slower than it need be.

    Args:
        kernels: As `preflight` found them.
        needed: As `needed_by` names them.
        accept_slow: Whether the user accepts slow kernels.

    Raises:
        EngineError: A kernel that would be used is wrong, or one is missing on a GPU.
    """
    for kernel in kernels.broken:
        if kernel.name not in needed:
            continue
        raise EngineError(
            f"{kernel.title} ({kernel.package} {kernel.version}) does not work on this "
            f"{kernels.device}: {kernel.note}.",
            f"Install another version of {kernel.package}; `studio kernels` tries all of them.",
        )
    missing = [k for k in _missing(kernels, needed) if k.name in _SLOW_WITHOUT]
    if missing and not accept_slow:
        raise EngineError(
            f"{missing[0].title} has no fast kernel on this {kernels.device}: {missing[0].note}. "
            "Its plain form is many times slower.",
            "Install flash-linear-attention (`pip install 'delta-studio[gpu]'`), or accept slow "
            "kernels in the Training section.",
            "train.accept_slow_kernels",
        )


def measure(device: torch.device) -> Kernels:
    """Try all kernels, and time those that work against the plain form; a minute on a new card.

    On a CPU nothing is timed: what runs there is the plain form.
    """
    found = preflight(device)
    if device.type != "cuda":
        return found
    speeds: dict[str, Callable[[], float]] = {
        "delta_rule": lambda: kernel_speed.delta_rule_speed(_delta_rule(), device),
        "convolution": lambda: kernel_speed.convolution_speed(_convolution(), device),
        "attention": lambda: kernel_speed.attention_speed(_attention(), device),
        "grouped_matmul": lambda: kernel_speed.grouped_matmul_speed(_grouped_matmul(), device),
    }
    timed = [
        kernel.model_copy(update={"ratio": speeds[kernel.name]()})
        if kernel.works and kernel.name in speeds
        else kernel
        for kernel in found.kernels
    ]
    return found.model_copy(update={"kernels": tuple(timed)})


def prove_kernels(kernels: Kernels, needed: frozenset[str]) -> Proof:
    """Say which kernels a run uses, and whether they agree with plain arithmetic on this device.

    Args:
        kernels: As `preflight` found them.
        needed: As `needed_by` names them; the others are not counted.
    """
    used = [kernel for kernel in kernels.kernels if kernel.is_used and kernel.name in needed]
    wrong = [kernel for kernel in used if not kernel.works]
    return Proof(
        name="kernels",
        passed=not wrong if used else None,
        summary=" ".join(_sentences(kernels, used, needed)),
        details=kernels.model_dump(mode="json") | {"needed": sorted(needed)},
    )


def _sentences(kernels: Kernels, used: list[Kernel], needed: frozenset[str]) -> Iterator[str]:
    right = [kernel for kernel in used if kernel.works]
    if not used:
        yield f"No fast kernel is used by this run on this {kernels.device}."
    if right:
        what = "The fast kernel" if len(right) == 1 else f"The {len(right)} fast kernels"
        titles = ", ".join(kernel.title for kernel in right)
        largest = max(kernel.error or 0.0 for kernel in right)
        yield (
            f"{what} of this run ({titles}) {'agrees' if len(right) == 1 else 'agree'} with plain "
            f"arithmetic to within {_rounded_up(largest)} on this {kernels.device}."
        )
    for kernel in used:
        if not kernel.works:
            yield f"Not right: {kernel.title}{f' ({kernel.note})' if kernel.note else ''}."
    for kernel in _missing(kernels, needed):
        yield f"{kernel.title} runs in its plain form: {kernel.note}."


def _missing(kernels: Kernels, needed: frozenset[str]) -> list[Kernel]:
    """Return the kernels that a run needs and a GPU lacks; on a CPU the plain form is meant."""
    if kernels.device == "CPU":
        return []
    return [k for k in kernels.kernels if k.name in needed and not k.is_used]


def _rounded_up(value: float) -> str:
    """Return a number with one digit that is not below it, as in `4e-03`."""
    if value <= 0:
        return "0"
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.0e}"


def _kernel(
    name: str,
    test: Callable[[torch.device, torch.dtype], float],
    device: torch.device,
    dtype: torch.dtype,
) -> Kernel:
    title, package = _TITLES[name]
    installed = _version(package)
    if installed is None:
        return _unused(name, f"{package} is not installed")
    note = ""
    try:
        with _lifted_guard() if name == "delta_rule" else _nothing() as guard:
            error = test(device, dtype)
            guard.is_passed = error <= self_tests.limit(dtype)
            note = guard.note
    # Whatever a kernel does wrong, from a missing symbol to a failed compilation, is the finding.
    except Exception as failure:  # noqa: BLE001
        first = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        return Kernel(
            name=name, title=title, package=package, version=installed, is_used=True,
            works=False, note=first[:200].rstrip("."),
        )  # fmt: skip
    works = error <= self_tests.limit(dtype)
    if not works:
        note = f"its results differ from plain arithmetic by {error:.2g} of their size"
    return Kernel(
        name=name, title=title, package=package, version=installed, is_used=True,
        works=works, error=error, note=note,
    )  # fmt: skip


def _unused(name: str, note: str) -> Kernel:
    title, package = _TITLES[name]
    return Kernel(
        name=name, title=title, package=package, version=_version(package), is_used=False,
        works=None, note=note,
    )  # fmt: skip


class _Guard:
    """What became of fla's refusal."""

    def __init__(self, note: str = "") -> None:
        self.note = note
        self.is_passed = False


@contextmanager
def _nothing() -> Iterator[_Guard]:
    yield _Guard()


@contextmanager
def _lifted_guard() -> Iterator[_Guard]:
    """Lift fla's refusal of Hopper cards while the self-test runs; keep it off when it passes."""
    module = _fla_backward()
    if module is None or not getattr(module, "IS_NVIDIA_HOPPER", False):
        yield _Guard()
        return
    guard = _Guard("fla's refusal of this Triton is lifted: heads of 128 compute correctly here")
    vars(module)["IS_NVIDIA_HOPPER"] = False
    try:
        yield guard
    finally:
        if not guard.is_passed:
            vars(module)["IS_NVIDIA_HOPPER"] = True


def _fla_backward() -> ModuleType | None:
    if importlib.util.find_spec("fla") is None:
        return None
    return importlib.import_module("fla.ops.common.chunk_o")


def _delta_rule() -> Callable[..., Any]:
    module: Any = importlib.import_module("fla.ops.gated_delta_rule")
    rule: Callable[..., Any] = module.chunk_gated_delta_rule
    return rule


def _convolution() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    module: Any = importlib.import_module("fla.modules.causal_conv1d")

    def convolve(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module.causal_conv1d(
            x=x, weight=weight, activation="silu", cu_seqlens=ends
        )[0]
        return found

    return convolve


def _attention() -> Callable[..., torch.Tensor]:
    module: Any = importlib.import_module("torch.nn.attention.varlen")
    # Causal is a flag up to torch 2.11 and a window since.
    is_flag = "is_causal" in inspect.signature(module.varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if is_flag else {"window_size": (-1, 0)}

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        found: torch.Tensor = module.varlen_attn(q, k, v, ends, ends, longest, longest, **causal)
        return found

    return attend


def _grouped_matmul() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, weight, ends: functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def _try_nf4(device: torch.device, dtype: torch.dtype) -> float:
    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        return bitsandbytes.functional.dequantize_4bit(packed, state)

    return self_tests.nf4_error(round_trip, device, dtype)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {"torch": str(torch.__version__)}
    triton = _version("triton")
    if triton:
        found["triton"] = triton
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.stdout.write(measure(best).model_dump_json() + "\n")
