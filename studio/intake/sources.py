"""Where files come from, besides the browser: this machine, the Hugging Face hub, URLs, buckets."""

import os
import re
import stat
from pathlib import Path

from studio.errors import InputError, NotFoundError
from studio.intake import addresses, buckets
from studio.intake.archive import size_of
from studio.intake.transfer import Fetched, Progress, SourceRules

__all__ = ["Fetched", "SourceRules", "fetch"]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s]+)?", re.ASCII)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_WAYS = (
    "Give a path on this machine (/data/chats.jsonl), a dataset of the hub (org/name or "
    "hf://datasets/org/name), or an address that begins with https://, s3://, gs:// or az://."
)
MAX_SOURCE_CHARACTERS = 4096


def fetch(source: str, folder: Path, *, rules: SourceRules, progress: Progress) -> Fetched:
    """Bring a source to this machine; a file of this machine is used in place.

    Args:
        source: A path, `hf://datasets/org/name[/file][@revision]`, `org/name[@revision]`, or a URL.
        folder: Where a download goes; names in it are chosen here.
        rules: What is allowed.
        progress: Called with the share that has arrived, 0 to 1.

    Raises:
        InputError: The source is not understood, not allowed, not there, or too large.
        MachineError: The network does not answer, or the disk is full.
    """
    text = source.strip()
    if not text or len(text) > MAX_SOURCE_CHARACTERS or "\x00" in text:
        raise InputError("This names no file.", _WAYS)
    scheme = _SCHEME.match(text)
    if scheme is None:
        if text[0] in "/~":
            return server_file(text, rules)
        if _REPOSITORY.fullmatch(text):
            text = f"hf://datasets/{text}"
            return _from_hub(text, folder, rules=rules, progress=progress)
        raise InputError(f"{text[:80]!r} is no absolute path, hub id or address.", _WAYS)
    protocol = scheme[1].lower()
    if protocol == "hf":
        return _from_hub(text, folder, rules=rules, progress=progress)
    if protocol in ("http", "https"):
        return addresses.download(text, folder, rules=rules, progress=progress)
    if protocol in buckets.STORES:
        return buckets.download(text, folder, rules=rules, progress=progress)
    raise InputError(f"Addresses that begin with {protocol}:// are not read.", _WAYS)


def _from_hub(source: str, folder: Path, *, rules: SourceRules, progress: Progress) -> Fetched:
    from studio.intake import hub  # 0.2 s, only for those who use it

    return hub.download(source, folder, rules=rules, progress=progress)


def server_file(text: str, rules: SourceRules) -> Fetched:
    """Return a file of this machine, or a folder of files, to be used in place.

    Args:
        text: Its absolute path; `~` is the home of whoever runs the page.
        rules: Whether paths are allowed, and below which folders.

    Raises:
        InputError: It is not allowed, or no regular file.
    """
    if not rules.allow_server_paths:
        raise InputError(
            "Paths on this machine are not read.",
            "Upload the file, or allow them with STUDIO_ALLOW_SERVER_PATHS=1.",
        )
    try:
        # Resolved before it is judged: neither .. nor a symbolic link leads out of the roots.
        path = Path(text).expanduser().resolve(strict=True)
        _check_roots(path, text, rules)
        size = _readable_size(path, text)
    except (FileNotFoundError, NotADirectoryError) as error:
        _check_roots(Path(text).expanduser().resolve(), text, rules)
        raise NotFoundError(f"There is no file {text} on this machine.", _WAYS) from error
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long, no such home
        raise InputError(f"{text[:200]} is no path that can be opened.", _WAYS) from error
    if not size:
        raise InputError(f"{text} is empty.", "Choose a file with conversations in it.")
    origin = {"kind": "path", "source": str(path)}
    return Fetched(paths=(path,), name=path.name, origin=origin)


def _readable_size(path: Path, text: str) -> int:
    """Return the size of a file; nothing is opened, since opening a pipe would wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{text} is no regular file.", "Name a file, or a folder of files.")
    if not os.access(path, os.R_OK):
        raise InputError(
            f"The studio may not read {text}.", "Let the user who runs the page read it."
        )
    return size_of(path)


def _check_roots(path: Path, text: str, rules: SourceRules) -> None:
    roots = [root.expanduser().resolve() for root in rules.server_path_roots]
    if roots and not any(path.is_relative_to(root) for root in roots):
        raise InputError(
            f"{text} lies outside the folders that may be read: "
            f"{', '.join(map(str, rules.server_path_roots))}.",
            "Move it there, or change STUDIO_SERVER_PATH_ROOTS.",
        )
