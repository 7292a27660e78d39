"""What all sources share: the rules, what they hand back, and a copy that knows when to stop."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from studio.errors import InputError, MachineError, disk_errors

Progress = Callable[[float], None]
# A server that sends a byte now and then would keep a thread of the page for ever.
MAX_SECONDS = 6 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRules:
    """What a source may do on this installation; built from the settings.

    Attributes:
        max_bytes: Largest download, all files together.
        min_free_bytes: Room that stays free on the disk.
        allow_server_paths: Whether files of this machine may be named by their path.
        server_path_roots: Folders that such files must lie in; empty = any.
        allow_private_urls: Whether URLs may lead to addresses that are not public.
        allow_http: Whether URLs may be unencrypted.
        proxy: Proxy for URLs; empty = none.
        hub_endpoint: Address of the Hugging Face hub; empty = the library's own.
    """

    max_bytes: int
    min_free_bytes: int = 0
    allow_server_paths: bool = False
    server_path_roots: tuple[Path, ...] = ()
    allow_private_urls: bool = False
    allow_http: bool = False
    proxy: str = ""
    hub_endpoint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Files that have arrived on this machine.

    Attributes:
        paths: The files, to be read one after the other; one, but for a dataset in shards.
        name: A name for people; any text, never part of a path.
        origin: Where it came from, without secrets: `kind`, `source`, and of the hub
            `repository`, `revision` (a commit), `files`.
    """

    paths: tuple[Path, ...]
    name: str
    origin: dict[str, str]

    @property
    def path(self) -> Path:
        """The first file."""
        return self.paths[0]


def save(
    blocks: Iterable[bytes], target: Path, *, expected: int | None, rules: SourceRules,
    progress: Progress,
) -> int:  # fmt: skip
    """Write what arrives into a file, and stop when it is more than the rules allow.

    Args:
        blocks: The bytes, as they arrive.
        target: The file; overwritten.
        expected: Size that the sender announced; None when it did not.
        rules: The limits.
        progress: Called with the share that has arrived, when a size was announced.

    Returns:
        The number of bytes.

    Raises:
        InputError: It is too large, empty, or did not arrive whole.
        MachineError: The disk is full.
    """
    if expected is not None:
        check_size(expected, target.parent, rules)
    written, ends = 0, time.monotonic() + MAX_SECONDS
    with disk_errors("downloading"), target.open("wb") as file:
        for block in blocks:
            written += len(block)
            check_size(written, target.parent, rules, on_disk=written - len(block))
            file.write(block)
            if expected:
                progress(min(written / expected, 1.0))
            if time.monotonic() > ends:
                raise InputError(
                    f"The download was stopped after {MAX_SECONDS / 3600:.0f} hours.",
                    "Copy the file to this machine and give its path.",
                )
    if expected is not None and written < expected:
        raise InputError(f"The download ended after {written} of {expected} bytes.", "Try again.")
    if not written:
        raise InputError("The download is empty.", "Check the address.")
    return written


def check_size(size: int, folder: Path, rules: SourceRules, *, on_disk: int = 0) -> None:
    """See that a download of `size` bytes is allowed and has room.

    Args:
        size: Bytes that the download has at least.
        folder: Where it is written.
        rules: The limits.
        on_disk: Bytes of it that are written already.

    Raises:
        InputError: It is larger than the settings allow.
        MachineError: It would fill the disk.
    """
    if size > rules.max_bytes:
        raise InputError(
            f"The download has more than the {rules.max_bytes / 2**20:.0f} MiB that a file may "
            "have.",
            "Take a part of it, or raise STUDIO_MAX_UPLOAD_BYTES.",
        )
    check_room(size - on_disk, folder, rules.min_free_bytes)


def check_room(needed: int, folder: Path, min_free_bytes: int) -> None:
    """See that a disk has room.

    Args:
        needed: Bytes that are still to be written.
        folder: A folder on the disk.
        min_free_bytes: Room that has to stay free.

    Raises:
        MachineError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free - needed < min_free_bytes:
        raise MachineError(
            f"The disk has {free / 2**30:.1f} GiB free; {needed / 2**30:.2f} GiB more would leave "
            f"less than the {min_free_bytes / 2**30:.1f} GiB that stay free.",
            "Free some space, or move the home folder with --home DIR.",
        )
