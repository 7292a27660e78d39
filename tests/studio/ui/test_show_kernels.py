"""Each kernel says in words whether it is there, used and right."""

import pytest

from studio.domain.kernels import Kernel, Kernels
from studio.ui.show_kernels import kernels


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"works": True, "error": 0.004, "ratio": 12.3}, "works, differs by 0.004, 12.3 times"),
        ({"works": True, "error": 0.0, "note": "guard lifted"}, "works, differs by 0; guard"),
        ({"works": False, "note": "differs by 0.4"}, "WRONG: differs by 0.4"),
        ({"is_used": False, "version": None, "note": "no <fla>"}, "not used: no &lt;fla&gt;"),
    ],
)
def test_a_kernel_is_told_in_words(changes: dict[str, object], words: str) -> None:
    values: dict[str, object] = {
        "name": "delta_rule",
        "title": "Gated DeltaNet",
        "package": "fla-core",
        "version": "0.6.0",
        "is_used": True,
        "works": None,
    }
    kernel = Kernel.model_validate(values | changes)
    html = kernels(Kernels(device="H200", versions={"torch": "2"}, kernels=(kernel,), seconds=1))
    assert words in html
    assert ("not installed" in html) == (kernel.version is None)
