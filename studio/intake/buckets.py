"""Files in object stores (s3://, gs://, az://, abfs://) through fsspec; each is an extra.

Credentials are found by the libraries themselves, where their own tools look for them.
"""

import importlib
import importlib.util
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import InputError
from studio.intake.transfer import Fetched, Progress, SourceRules, save

BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Store:
    package: str
    extra: str
    faults: tuple[tuple[str, str], ...]


_AZURE = _Store("adlfs", "azure", (("azure.core.exceptions", "AzureError"),))
# Faults that the libraries do not turn into OSError.
STORES = {
    "s3": _Store(
        "s3fs",
        "s3",
        (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError")),
    ),
    "gs": _Store(
        "gcsfs",
        "gcs",
        (("google.auth.exceptions", "GoogleAuthError"), ("gcsfs.retry", "HttpError")),
    ),
    "az": _AZURE,
    "abfs": _AZURE,
}


def download(source: str, folder: Path, *, rules: SourceRules, progress: Progress) -> Fetched:
    """Download an object.

    Args:
        source: For instance `s3://bucket/folder/file.jsonl`.
        folder: Where the file goes.
        rules: The limits.
        progress: Called with the share that has arrived.

    Raises:
        InputError: The extra is missing, there is no such object, or it is too large.
        MachineError: The disk is full.
    """
    protocol = source.partition("://")[0].lower()
    store = STORES[protocol]
    if "::" in source:
        raise InputError(
            "An address with :: in it chains protocols, which is not allowed.",
            f"Give {protocol}://bucket/file.",
        )
    if ":" in source.partition("://")[2].partition("@")[0] and "@" in source:
        raise InputError(
            "An address with a password in it is not taken, since addresses are remembered.",
            "Log in with the store's own tool on the machine where the page runs.",
        )
    if importlib.util.find_spec(store.package) is None:
        raise InputError(
            f"Reading {protocol}:// needs the package {store.package}, which is not installed.",
            f'Run pip install "delta-studio[{store.extra}]" where the page runs.',
        )
    import fsspec  # 0.13 s, only for those who use it

    with _faults(protocol, _known_faults(store)):
        return copy(fsspec.filesystem(protocol), source, folder, rules=rules, progress=progress)


def copy(
    store: Any, source: str, folder: Path, *, rules: SourceRules, progress: Progress
) -> Fetched:
    """Copy an object out of a file system of fsspec.

    Args:
        store: The file system.
        source: The object's address.
        folder: Where the file goes.
        rules: The limits.
        progress: Called with the share that has arrived.

    Raises:
        InputError: It is no file, or too large.
        FileNotFoundError: There is no such object.
    """
    info = store.info(source)
    if info["type"] != "file":
        raise InputError(f"{source} is a folder.", "Name one file in it.")
    target = folder / "download"
    with store.open(source, "rb", block_size=BLOCK_BYTES, cache_type="readahead") as file:
        blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
        save(blocks, target, expected=info["size"], rules=rules, progress=progress)
    origin = {"kind": "bucket", "source": source.partition("?")[0]}
    return Fetched(paths=(target,), name=posixpath.basename(source), origin=origin)


def _known_faults(store: _Store) -> tuple[type[Exception], ...]:
    found = (vars(importlib.import_module(module))[name] for module, name in store.faults)
    return (PermissionError, *found)


@contextmanager
def _faults(protocol: str, known: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"There is no such object in this {protocol}:// bucket, or no such bucket.",
            "Check the address.",
        ) from error
    except known as error:
        # The text of the fault may quote keys; its name says enough.
        raise InputError(
            f"The {protocol}:// store does not let the studio read this ({type(error).__name__}).",
            "Log in with the store's own tool on the machine where the page runs, or set its "
            "credentials in the environment.",
        ) from error
