"""Whether SQLite can work where the home folder lies (B10)."""

import subprocess
import sys
from pathlib import Path

import pytest

from studio.errors import MachineError
from studio.store import probe
from studio.store.database import Database

# From real machines: an ext4 root, a home by NFS 4, a CIFS share with a space in its name, 9p of a
# virtual machine, a FUSE file system, an overlay of a container, and a tmpfs upon a mounted disk.
MOUNTINFO = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resv_strict,resuid=65534
22 27 0:21 / /proc rw,relatime - proc proc rw
90 27 0:52 / /home rw,nosuid,relatime shared:40 - nfs4 10.0.0.5:/export/home rw,vers=4.2,rsize=1048576
91 27 0:53 / /mnt/team\040share rw,relatime shared:41 master:7 - cifs //files/team rw,vers=3.1.1,username=u
92 27 0:54 / /mnt/host rw,relatime - 9p hostshare rw,access=client,trans=virtio
93 27 0:55 / /mnt/fuse rw,nosuid,nodev,relatime - fuse.sshfs user@h:/data rw,user_id=0,group_id=0
94 27 0:56 / /var/lib/docker/overlay2/merged rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u
95 27 8:17 / /data rw,noatime - xfs /dev/sdb1 rw,attr2
96 95 0:57 / /data ro,noatime - tmpfs tmpfs rw,size=1024k
97 27 8:33 / /home/local rw,noatime - ext4 /dev/sdc1 rw
"""
MOUNTS = probe.parse_mounts(MOUNTINFO)


@pytest.mark.parametrize(
    ("folder", "kind", "point"),
    [
        ("/root/.delta-studio", "ext4", "/"),
        ("/home/u/.delta-studio", "nfs4", "/home"),
        ("/home/local/studio", "ext4", "/home/local"),
        ("/homestead", "ext4", "/"),
        ("/mnt/team share/studio", "cifs", "/mnt/team share"),
        ("/mnt/host", "9p", "/mnt/host"),
        ("/mnt/fuse/a/b", "fuse.sshfs", "/mnt/fuse"),
        ("/data/studio", "tmpfs", "/data"),
    ],
)
def test_b10_the_mount_of_a_folder_is_the_innermost_and_uppermost(
    folder: str, kind: str, point: str
) -> None:
    mount = probe.mount_of(Path(folder), MOUNTS)
    assert mount is not None
    assert (mount.kind, mount.point) == (kind, point)
    assert mount.is_read_only is (point == "/data")


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/home/u/studio", "nfs4, mounted at /home"),
        ("/mnt/team share/studio", "cifs, mounted at /mnt/team share"),
    ],
)
def test_b10_a_network_file_system_is_refused_by_kind_and_mount(folder: str, said: str) -> None:
    with pytest.raises(MachineError, match=said) as caught:
        probe.refuse_unfit(Path(folder), probe.mount_of(Path(folder), MOUNTS))
    assert "STUDIO_DATABASE_URL" in caught.value.hint
    assert "PostgreSQL" in caught.value.hint


@pytest.mark.parametrize("kind", ["9p", "fuse.gocryptfs", "ntfs3", "vfat", "virtiofs"])
def test_b10_what_is_not_known_is_judged_by_a_real_try(tmp_path: Path, kind: str) -> None:
    mount = probe.Mount(point="/", kind=kind, is_read_only=False)
    probe.refuse_unfit(tmp_path, mount)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MachineError, match=rf"does not work .* \({kind}, mounted at /\)"):
        probe.refuse_unfit(Path("/proc"), mount)


def test_b10_the_try_finds_what_fails_behind_a_log_that_was_switched_on(tmp_path: Path) -> None:
    # Files that cannot grow let SQLite begin and fail at its writes, as some file systems do.
    code = (
        "import resource, signal, sys; from pathlib import Path; from studio.store import probe\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "print(probe.try_folder(Path(sys.argv[1])))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip()
    assert list(tmp_path.iterdir()) == []


def test_b10_this_machine_has_a_folder_that_works(tmp_path: Path) -> None:
    assert probe.try_folder(tmp_path) == ""
    Database(tmp_path / "studio.db").close()
