"""Kernels: the fast code that a GPU needs, and whether each piece works on this machine."""

from pydantic import Field

from studio.domain.section import Section


class Kernel(Section):
    """One piece of fast code, as it was tried a moment ago.

    Attributes:
        name: What it computes, as in `delta_rule`.
        title: The same for people.
        package: Distribution that brings it.
        version: Installed version; None where the package is missing.
        is_used: Whether the engine uses it on this device; if not, the plain form runs.
        works: Whether its results equal the plain form's; None where it was not tried.
        error: Largest relative error of results and gradients; None where it was not tried.
        ratio: How many times faster than the plain form; None where it was not timed.
        note: Why it is not used or does not work, or what was done so that it does.
    """

    name: str
    title: str
    package: str
    version: str | None
    is_used: bool
    works: bool | None
    error: float | None = None
    ratio: float | None = None
    note: str = ""


class Kernels(Section):
    """All kernels of a device: the content of kernels.json.

    Attributes:
        device: As people call it, as in `NVIDIA H200` or `CPU`.
        versions: Of torch, triton and CUDA.
        seconds: How long trying them took.
    """

    version: int = 1
    device: str
    versions: dict[str, str]
    kernels: tuple[Kernel, ...]
    seconds: float = Field(ge=0)

    def find(self, name: str) -> Kernel:
        """Return a kernel by its name."""
        return next(kernel for kernel in self.kernels if kernel.name == name)

    @property
    def broken(self) -> list[Kernel]:
        """Kernels that give wrong results where they would be used."""
        return [kernel for kernel in self.kernels if kernel.is_used and kernel.works is False]
