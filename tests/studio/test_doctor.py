"""The doctor says what is there, judges what it can, and never fails by itself."""

import shutil

from studio import doctor
from studio.disk import take_lock
from studio.services.studio import Studio


def findings(studio: Studio) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(studio)}


def test_this_machine_can_run_the_studio(studio: Studio) -> None:
    found = findings(studio)
    assert [f.name for f in found.values() if f.good is False and f.name != "disk"] == []
    assert {*doctor.PACKAGES, *doctor.GPU_PACKAGES, "python", "sqlite", "gpus"} <= set(found)


def test_each_finding_says_something(studio: Studio) -> None:
    assert all(finding.text for finding in doctor.examine(studio))


def test_the_disk_is_judged_by_what_is_free(studio: Studio) -> None:
    free = shutil.disk_usage(studio.home.path).free
    found = findings(studio)["disk"]
    assert found.good is (free > doctor.MIN_FREE_BYTES)
    assert str(studio.home.path) in found.text


def test_a_worker_is_seen_by_its_lock(studio: Studio) -> None:
    assert findings(studio)["worker"].good is None
    with take_lock(studio.home.worker_lock):  # type: ignore[union-attr]
        assert findings(studio)["worker"].good is True
