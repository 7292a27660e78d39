"""Expected errors. Each has a message (what is wrong, the value) and a hint (what to do).

StudioError
|-- InputError       what the user gave is wrong                        (CLI exit code 2)
|   |-- NotFoundError    no such dataset, preset, run, artifact
|   `-- ConflictError    right in itself, but not in the present state
|-- MachineError     the machine lacks something: disk, port, memory    (CLI exit code 2)
`-- EngineError      a training, merge or chat process stopped and said why
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# The last three: a file stands where a folder should, or the folder is not there.
_UNWRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
)


class StudioError(Exception):
    """An error that a user can understand and fix.

    Args:
        message: One sentence: what is wrong, with the value.
        hint: One sentence: what to do.
        field: Dotted path of the field at fault, for instance `lora.rank`; empty when none is.
        code: Exit code of a process that ends with it, one of studio.domain.outcome; 0 leaves it
            to the class.
    """

    def __init__(self, message: str, hint: str = "", field: str = "", *, code: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.code = code

    def __str__(self) -> str:
        """Return message and hint as one paragraph."""
        return f"{self.message} {self.hint}".strip()


class InputError(StudioError):
    """What the user gave is wrong."""


class NotFoundError(InputError):
    """No object has that name or number."""


class ConflictError(InputError):
    """The request is right in itself, but not in the present state of its object."""


class MachineError(StudioError):
    """The machine lacks something that the request needs."""


class EngineError(StudioError):
    """A process of the workers stopped and said why."""


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Translate a full or read-only disk into a sentence.

    Args:
        doing: What was being done, as in "storing the dataset".

    Raises:
        MachineError: The disk is full, over quota or read-only, or a folder is none or missing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"The disk is full: {doing} failed and nothing was kept.",
                "Free some space, or move the home folder with --home DIR, then try again.",
            ) from error
        if error.errno in _UNWRITABLE:
            raise MachineError(
                f"The folder cannot be written: {doing} failed at {error.filename}.",
                "Choose a writable home folder with --home DIR.",
            ) from error
        raise
