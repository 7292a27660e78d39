"""What the name of a file says: how its content is laid out, and what its Dataset is called."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

PACKED = (".gz", ".zip")
TEXTS = (".txt", ".md", ".text", ".rst")
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
_DATA = (*TEXTS, *LINES, *TABLES, ".json", ".parquet")
# What people put beside data, by the name of the file without its ending, and by its ending.
_NOTES = re.compile(
    r"(readme|licen[cs]e)([._-].*)?|copying|notice|changelog|citation", re.IGNORECASE
)
_NOTE_SUFFIXES = ("", *TEXTS)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".svg", ".tif", ".tiff", ".pdf")


def suffix_of(name: str) -> str:
    """Return the ending that tells of a content, in small letters: `.jsonl` of `a.JSONL.gz`."""
    return PurePosixPath(_unpacked(name)).suffix.lower()


def telling_name(*names: str) -> str:
    """Return the first name that ends as data does, empty where none of them says anything."""
    return next((name for name in names if suffix_of(name) in _DATA), "")


def dataset_name(file_name: str) -> str:
    """Return what a Dataset is called after its file: `chats` of `chats.jsonl.gz`."""
    bare = _unpacked(file_name)
    return bare[: -len(suffix)] if (suffix := suffix_of(bare)) in _DATA else bare


def beside(names: Sequence[str]) -> frozenset[str]:
    """Return which files stand beside the data as notes or pictures; none where no other is there."""
    found = frozenset(filter(_is_beside, names))
    return found if len(found) < len(set(names)) else frozenset()


def _is_beside(name: str) -> bool:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    is_note = suffix in _NOTE_SUFFIXES and _NOTES.fullmatch(path.stem) is not None
    return is_note or suffix in _PICTURES


def _unpacked(name: str) -> str:
    """Return the last part of a name, without what an archive adds to it."""
    bare = PurePosixPath(name.strip()).name
    while (suffix := PurePosixPath(bare).suffix).lower() in PACKED:
        bare = bare[: -len(suffix)]
    return bare
