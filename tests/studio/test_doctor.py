"""The doctor says what is there, judges what it can, and never fails by itself."""

import shutil

import pytest

from studio import doctor
from studio.doctor_store import Finding
from studio.locks import take_lock
from studio.services.studio import Studio
from studio.store import backup


def findings(studio: Studio) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(studio)}


def test_this_machine_can_run_the_studio(studio: Studio) -> None:
    found = findings(studio)
    assert [f.name for f in found.values() if f.good is False and f.name != "disk"] == []
    assert {*doctor.PACKAGES, *doctor.GPU_PACKAGES, "python", "sqlite", "gpus"} <= set(found)
    assert {"database", "schema", "file system", "backup"} <= set(found)


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


@pytest.mark.parametrize(
    ("version", "fixed"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 9), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 54, 0), True),
    ],
)
def test_b11_the_fault_of_the_write_ahead_log_is_known_by_versions(
    version: tuple[int, int, int], fixed: bool
) -> None:
    assert doctor.is_fixed_sqlite(version) is fixed


def test_the_doctor_looks_at_the_database_and_its_newest_backup(studio: Studio) -> None:
    before = findings(studio)
    assert "journal wal, quick_check ok" in before["database"].text
    assert before["backup"].good is None
    copy = backup.backup(studio.database, "by hand")
    after = findings(studio)["backup"]
    assert after.good is True
    assert after.text.startswith(f"{copy.name}, less than an hour old")


def test_a_database_that_went_bad_is_a_finding(studio: Studio) -> None:
    studio.home.database.write_bytes(b"no database" * 1_000)
    found = findings(studio)["database"]
    assert found.good is False
    assert "damaged" in found.text
