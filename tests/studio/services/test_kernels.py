"""Kernels are tried in a process of their own."""

from studio.services import kernels


def test_the_kernels_of_this_machine_are_tried() -> None:
    found = kernels.measure()

    assert found.find("nf4").works
    assert found.find("grouped_matmul").works
    assert "torch" in found.versions
