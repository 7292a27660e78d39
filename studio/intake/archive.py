"""Open a file as the parts that it holds: itself, what is in its gzip, the members of its zip.

Everything is read as a stream; nothing is ever written to disk. Whether a file is packed is told
by its first bytes, never by its name. Notes and pictures that stand beside data are passed over.
"""

import gzip
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from studio.domain.section import Section
from studio.domain.validation import short
from studio.errors import InputError
from studio.intake.members import wanted_members
from studio.intake.names import beside, telling_name

BUFFER_BYTES = 2**20
# Text rarely packs better than 30 to 1; deflate ends at 1032 to 1.
RATIO_FLOOR_BYTES = 64 * 2**20
GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")


class Limits(Section):
    """How much one upload may unfold to."""

    max_bytes: int = Field(default=64 * 2**30, ge=1, description="Bytes after unpacking, in all.")
    max_members: int = Field(default=10_000, ge=1, description="Members of a zip.")
    max_ratio: int = Field(default=500, ge=1, description="Bytes after unpacking per packed byte.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One readable content of an upload.

    Attributes:
        name: Name in the zip, fit to be shown; empty when the upload holds one content.
        stream: Its bytes. Reading raises InputError where a packed part is damaged or too large.
        size: Length of the content in bytes, None where only reading tells (gzip).
        file: The file on disk; its `tell()` shows how far reading has come.
        spend: Counts bytes that a reader unfolds by itself, as of Parquet; InputError beyond limits.
        file_name: Name by which its layout may be told; empty where none says anything.
    """

    name: str
    stream: BinaryIO
    size: int | None
    file: BinaryIO
    spend: Callable[[int], None]
    file_name: str = ""


def pass_over(_: str) -> None:
    """Tell nobody that a file was passed over."""


def open_parts(
    path: Path, *, limits: Limits, name: str = "", skip: Callable[[str], None] = pass_over
) -> Iterator[Part]:
    """Yield the contents of a file, one after the other; a part closes when the next is asked for.

    Args:
        path: The file, or a folder whose files are meant together, as the shards of a dataset.
        limits: How much each file may unfold to.
        name: What the file was called where it came from, if it has another name here.
        skip: Called with the name, fit to be shown, of each file that is passed over.

    Raises:
        InputError: The file cannot be opened, is damaged, larger than the limits, or an archive
            that is refused; while parts are yielded or read.
    """
    if path.is_dir():
        yield from _parts_of_folder(path, limits, skip)
        return
    name = telling_name(name, path.name)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        budget = _Budget(limits, packed_bytes=size)
        spend = partial(budget.spend, what="The file")
        head = file.peek(4)[:4]
        if head.startswith(GZIP_MAGIC):
            with closing(gzip.GzipFile(fileobj=file)) as unzipped:
                stream = _buffered(_Unpacked(unzipped, "The gzip file", budget))
                _refuse_nested(stream, "what is in the gzip file")
                yield Part(
                    name="", stream=stream, size=None, file=file, spend=spend, file_name=name
                )
        elif head in ZIP_MAGICS:
            yield from _members(file, budget, name, skip)
        elif size > limits.max_bytes:
            raise InputError(
                f"The file has {size:,} bytes; at most {limits.max_bytes:,} are read.",
                "Split it into several files.",
            )
        else:
            yield Part(name="", stream=file, size=size, file=file, spend=spend, file_name=name)


def files_of(path: Path) -> list[Path]:
    """Return a file itself, or the files that lie in a folder, in the order of their names.

    Hidden files and links are left out: a link may lead anywhere.
    """
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.iterdir()
        if not file.name.startswith(".") and stat.S_ISREG(file.lstat().st_mode)
    )


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files that lie in a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def _parts_of_folder(folder: Path, limits: Limits, skip: Callable[[str], None]) -> Iterator[Part]:
    files = files_of(folder)
    if not files:
        raise InputError(f"The folder {folder.name} holds no files.", "Give a folder with data.")
    skipped = beside([file.name for file in files])
    for file in files:
        shown = short(file.name)
        if file.name in skipped:
            skip(shown)
            continue
        for part in open_parts(file, limits=limits, skip=partial(_skip_inside, skip, shown)):
            yield replace(part, name="/".join(filter(None, (shown, part.name))))


def _skip_inside(skip: Callable[[str], None], outer: str, inner: str) -> None:
    skip(f"{outer}/{inner}")


def _open(path: Path) -> io.BufferedReader:
    try:
        # Asked first: opening a pipe would wait for a writer, and a device never ends.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a file.", "Give the path of one file.")
        return io.BufferedReader(io.FileIO(path), BUFFER_BYTES)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(
            f"The file {path} cannot be read: {reason.lower()}.", "Give the path of a data file."
        ) from error


class _Budget:
    """Counts the unpacked bytes of a whole upload."""

    def __init__(self, limits: Limits, packed_bytes: int) -> None:
        self.limits = limits
        self._packed_bytes = packed_bytes
        self._unpacked_bytes = 0

    def spend(self, num_bytes: int, what: str) -> None:
        self._unpacked_bytes += num_bytes
        if self._unpacked_bytes > self.limits.max_bytes:
            raise InputError(
                f"{what} unpacks to more than {self.limits.max_bytes:,} bytes.",
                "Split it into several files.",
            )
        ratio = self._unpacked_bytes / max(self._packed_bytes, 1)
        if self._unpacked_bytes > RATIO_FLOOR_BYTES and ratio > self.limits.max_ratio:
            raise InputError(
                f"{what} unpacks to more than {self.limits.max_ratio} times its size, as no "
                "real data does.",
                "Upload the file unpacked.",
            )


class _Unpacked(io.RawIOBase):
    """A decompressing stream that is counted, and whose errors are sentences."""

    def __init__(
        self,
        source: gzip.GzipFile | zipfile.ZipExtFile,
        what: str,
        budget: _Budget,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self._source = source
        self._what = what
        self._budget = budget
        self._left = size
        self._fault: InputError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # CPython gives this
        """Fill the buffer; what is good before a damaged place is given before the error is."""
        at = 0
        while at < len(buffer) and self._fault is None:
            try:
                data = self._read(len(buffer) - at)
            except InputError as error:
                self._fault = error
                break
            if not data:
                return at
            buffer[at : at + len(data)] = data
            at += len(data)
        if self._fault is not None and not at:
            raise self._fault
        return at

    def _read(self, size: int) -> bytes:
        try:
            # read() would lose what it has gathered when an error comes.
            data = self._source.read1(size)
        except EOFError as error:
            raise self._damage("is cut off: its end is missing") from error
        except gzip.BadGzipFile as error:
            raise self._damage(_gzip_reason(error)) from error
        except zipfile.BadZipFile as error:
            raise self._damage("is damaged: its checksum does not fit its content") from error
        except zlib.error as error:
            raise self._damage("is damaged: its packed data makes no sense") from error
        self._budget.spend(len(data), self._what)
        if self._left is not None:
            self._left -= len(data)
            if not data and self._left:
                raise self._damage("is damaged: it states another length than its content has")
        return data

    def _damage(self, reason: str) -> InputError:
        return InputError(f"{self._what} {reason}.", "Pack it again, or upload it unpacked.")


def _gzip_reason(error: gzip.BadGzipFile) -> str:
    message = str(error)
    if message.startswith("CRC"):
        return "is damaged: its checksum does not fit its content"
    if message.startswith("Incorrect length"):
        return "is damaged: it states another length than its content has"
    if message.startswith("Not a gzipped file"):
        return "goes on after its end with something that is not gzip"
    return f"is damaged ({short(message)})"


def _buffered(raw: io.RawIOBase) -> io.BufferedReader:
    return io.BufferedReader(raw, BUFFER_BYTES)


def _refuse_nested(stream: io.BufferedReader, what: str) -> None:
    head = stream.peek(4)[:4]
    if head.startswith(GZIP_MAGIC) or head in ZIP_MAGICS:
        raise InputError(
            f"In the upload, {what} is an archive again.",
            "Unpack it once and upload what is inside.",
        )


# ---- zip --------------------------------------------------------------------------------------


class _Directory:
    """The file as zipfile sees it: a table of contents that states gigabytes is not read.

    zipfile reads the table in one piece, of a length that the archive itself states.
    """

    def __init__(self, file: io.BufferedReader, max_members: int) -> None:
        self._file = file
        self._max_read_bytes = max(2**17, BUFFER_BYTES, 256 * max_members)
        self.seek, self.tell = file.seek, file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self._max_read_bytes:
            raise InputError(
                f"The zip states a table of contents of {size:,} bytes.",
                "Pack fewer files, with shorter names.",
            )
        return self._file.read(size)


def _members(
    file: io.BufferedReader, budget: _Budget, name: str, skip: Callable[[str], None]
) -> Iterator[Part]:
    with closing(_open_zip(file, budget.limits.max_members)) as archive:
        members = wanted_members(archive, budget.limits.max_members)
        skipped = beside([member.filename for member in members])
        for member in members:
            shown = short(member.filename, 200)
            if member.filename in skipped:
                skip(shown)
                continue
            what = f"{shown} in the zip"
            with closing(_open_member(archive, member, what)) as source:
                stream = _buffered(_Unpacked(source, what, budget, member.file_size))
                _refuse_nested(stream, what)
                yield Part(
                    name=shown,
                    stream=stream,
                    size=member.file_size,
                    file=file,
                    spend=partial(budget.spend, what=what),
                    file_name=telling_name(member.filename, name),
                )


def _open_zip(file: io.BufferedReader, max_members: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(_Directory(file, max_members))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise InputError(
            f"The zip is damaged or cut off ({short(str(error)).rstrip('.').lower()}).",
            "Pack it again, or upload the files unpacked.",
        ) from error


def _open_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, what: str
) -> zipfile.ZipExtFile:
    try:
        source = archive.open(member)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise InputError(
            f"{what} is damaged ({short(str(error)).rstrip('.').lower()}).",
            "Pack the archive again, or upload the files unpacked.",
        ) from error
    assert isinstance(source, zipfile.ZipExtFile)  # reading gives no other
    return source
