"""Kernels of this machine as HTML: what is there, and whether it works."""

from html import escape

from studio.domain.kernels import Kernel, Kernels


def kernels(found: Kernels) -> str:
    """Return a table of kernels with the device above it."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    rows = "".join(_row(kernel) for kernel in found.kernels)
    return (
        f"<p><b>{escape(found.device)}</b> · {escape(versions)} · tried in "
        f"{found.seconds:.1f} s</p>"
        '<table class="findings"><thead><tr><th scope="col">Kernel</th>'
        '<th scope="col">Installed</th><th scope="col">Here</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _row(kernel: Kernel) -> str:
    installed = f"{kernel.package} {kernel.version}" if kernel.version else "not installed"
    return (
        f"<tr><td>{escape(kernel.title)}</td><td>{escape(installed)}</td>"
        f"<td>{escape(_verdict(kernel))}</td></tr>"
    )


def _verdict(kernel: Kernel) -> str:
    if not kernel.is_used:
        return f"not used: {kernel.note}"
    if not kernel.works:
        return f"WRONG: {kernel.note}"
    said = f"works, differs by {kernel.error or 0.0:.1g}"
    if kernel.ratio:
        said += f", {kernel.ratio:.1f} times the plain form"
    return f"{said}; {kernel.note}" if kernel.note else said
