"""Take the bytes of uploads: one writer at a time, hashed on the way, off the event loop.

The folder of an upload is described in `studio.services.uploads`.
"""

import hashlib
from dataclasses import replace
from io import TextIOWrapper
from typing import Any

from studio.errors import ConflictError, InputError, disk_errors
from studio.intake.transfer import check_room
from studio.locks import take_lock
from studio.services.studio import Studio
from studio.services.uploads import Note, Upload, find, write_note

HASH_BLOCK_BYTES = 4 * 2**20


class Receiver:
    """Takes the bytes of uploads and hashes them on the way; one in a process.

    Hashes are remembered between requests. After a restart they are computed again from what is
    on the disk, which is the only truth about how much has arrived.

    Args:
        studio: The installation.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._hashes: dict[str, tuple[int, Any]] = {}

    def open(self, upload_id: str, offset: int) -> "Writing":
        """Go on with an upload; may take a while after a restart.

        Args:
            upload_id: The upload.
            offset: Where the first byte that comes belongs.

        Raises:
            NotFoundError: There is no such upload.
            ConflictError: Another request is writing it, or it has come to another offset.
        """
        folder = find(self._studio, upload_id).path.parent
        try:
            lock = take_lock(folder / "lock")
        except FileNotFoundError:  # discarded meanwhile
            find(self._studio, upload_id)
            raise
        if lock is None:
            raise ConflictError("This upload is being written already.", "Try again in a moment.")
        try:
            upload = find(self._studio, upload_id)
            if upload.offset != offset:
                raise ConflictError(
                    f"The upload has come to byte {upload.offset}, not {offset}.",
                    "Ask for the offset and go on from there.",
                )
            digest = self._digest(upload)
        except BaseException:
            lock.close()
            raise
        return Writing(self._studio.settings.min_free_bytes, upload, digest, lock)

    def close(self, writing: "Writing") -> Upload:
        """End a request, whole or cut off; the upload is finished when all of it is here.

        Raises:
            NotFoundError: It was discarded meanwhile.
        """
        upload = writing.close()
        self._hashes[upload.id] = (upload.offset, writing.digest)
        if upload.is_finished or not upload.path.exists():
            del self._hashes[upload.id]
        return find(self._studio, upload.id)

    def forget(self, upload_id: str) -> None:
        """Drop the running hash of an upload that was discarded."""
        self._hashes.pop(upload_id, None)

    def _digest(self, upload: Upload) -> Any:
        offset, digest = self._hashes.get(upload.id, (-1, None))
        if digest is not None and offset == upload.offset:
            return digest
        digest = hashlib.sha256()
        with upload.path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
        return digest


class Writing:
    """One request's turn at an upload; `Receiver.open` makes it and `Receiver.close` ends it.

    Args:
        min_free_bytes: Room that stays free on the disk.
        upload: As it was at the start.
        digest: Running sha256 of what has arrived.
        lock: Held until the end.
    """

    def __init__(
        self, min_free_bytes: int, upload: Upload, digest: Any, lock: TextIOWrapper
    ) -> None:
        self.digest = digest
        self._upload = upload
        self._min_free_bytes = min_free_bytes
        self._lock = lock
        # Unbuffered: what was written is the offset, also when the next write fails.
        self._file = upload.path.open("ab", buffering=0)

    def write(self, block: bytes | bytearray) -> None:
        """Append a block.

        Raises:
            InputError: More comes than was announced; the block is not kept.
            MachineError: The disk is full.
        """
        upload = self._upload
        if upload.offset + len(block) > upload.size_bytes:
            raise InputError(
                f"More bytes came than the {upload.size_bytes} that were announced.",
                "Choose the file again.",
                "size_bytes",
            )
        folder = upload.path.parent
        with disk_errors("storing the upload"):
            check_room(len(block), folder, self._min_free_bytes)
            rest = memoryview(block)
            while rest:
                written = self._file.write(rest)
                self.digest.update(rest[:written])
                rest = rest[written:]
                self._upload = replace(self._upload, offset=self._upload.offset + written)

    def close(self) -> Upload:
        """Release the upload, and note its hash when it is whole."""
        with self._lock, self._file:
            upload = self._upload
            if upload.offset == upload.size_bytes and upload.path.exists():
                upload = replace(upload, sha256=self.digest.hexdigest())
                note = Note(name=upload.name, size_bytes=upload.size_bytes, sha256=upload.sha256)
                with disk_errors("finishing the upload"):
                    write_note(upload.path.parent, note)
        return upload
