"""Datasets of the Hugging Face hub: which files, at which commit; scripts are never loaded."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from httpx2 import HTTPError  # what huggingface_hub >= 2 lets through when the network fails
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo

from studio.errors import InputError, MachineError, NotFoundError, disk_errors
from studio.intake.transfer import Fetched, Progress, SourceRules, check_size

PREFIX = "hf://datasets/"
_ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([^@]+?))?/?(?:@([^@\s]+))?", re.ASCII)
_SUFFIXES = re.compile(
    r"\.(jsonl|json|ndjson|parquet|csv|tsv|txt|zip)(\.gz)?$|\.gz$", re.IGNORECASE
)
_NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# As the library `datasets` reads file names: https://huggingface.co/docs/datasets/repository_structure
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_MAX_LISTED = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    repository: str
    path: str
    revision: str | None


def download(source: str, folder: Path, *, rules: SourceRules, progress: Progress) -> Fetched:
    """Download the files of a dataset, at the commit that its revision names now.

    Args:
        source: `hf://datasets/org/name[/file][@revision]`; file may be a folder or have `*` in it.
        folder: Where the files go.
        rules: The limits, and the hub's address.
        progress: Called with the share that has arrived.

    Raises:
        NotFoundError: There is no such dataset or revision.
        InputError: It has no data files, or several sets of them and none is named.
        MachineError: The hub cannot be reached or refuses, or the disk is full.
    """
    wanted = _parsed(source)
    endpoint = rules.hub_endpoint or None
    with _hub_errors(wanted):
        info = HfApi(endpoint=endpoint).dataset_info(
            wanted.repository, revision=wanted.revision, files_metadata=True
        )
    if info.sha is None:
        raise MachineError("The hub does not tell the dataset's commit.", "Try again later.")
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    files = _chosen(wanted, info, [name for name in sizes if _is_data(name)])
    total = sum(sizes[name] for name in files)
    check_size(total, folder, rules)
    paths, done = [], 0
    for name in files:
        with _hub_errors(wanted), disk_errors("downloading from the hub"):
            path = Path(
                hf_hub_download(
                    wanted.repository,
                    name,
                    repo_type="dataset",
                    revision=info.sha,
                    local_dir=folder / "hub",
                    endpoint=endpoint,
                )
            )
        paths.append(_moved(path, folder))
        done += paths[-1].stat().st_size
        # Once more with what came: sizes are what the hub said.
        check_size(done, folder, rules, on_disk=done)
        progress(min(done / max(total, 1), 1.0))
    return Fetched(
        paths=tuple(paths), name=_name(wanted, files), origin=_origin(wanted, info.sha, files)
    )


def _parsed(source: str) -> _Wanted:
    found = _ADDRESS.fullmatch(source.removeprefix(PREFIX)) if source.startswith(PREFIX) else None
    if found is None:
        raise InputError(
            f"{source[:120]!r} is no address of a dataset on the hub.",
            "Write hf://datasets/org/name, or hf://datasets/org/name/folder/file.jsonl@revision.",
        )
    path = found[2] or ""
    if path and not _is_plain(path):
        raise InputError(
            f"{path!r} is no name of a file in a repository.", "Name it as the hub shows it."
        )
    return _Wanted(repository=found[1], path=path, revision=found[3])


def _is_plain(name: str) -> bool:
    """Tell whether a file's name stays where it is put."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not set(name) & {"\\", "\x00"}


def _is_data(name: str) -> bool:
    base = PurePosixPath(name).name
    hidden = any(part.startswith(".") for part in name.split("/"))
    return bool(_SUFFIXES.search(base)) and base not in _NOT_DATA and not hidden and _is_plain(name)


# ---- which files ------------------------------------------------------------------------------


def _chosen(wanted: _Wanted, info: DatasetInfo, names: list[str]) -> list[str]:
    """Return the files to read: those that are named, else the training split."""
    if not names:
        raise InputError(
            f"{wanted.repository} has no data files that the studio reads.",
            "It reads JSON lines, JSON, Parquet, CSV, text, gzip and zip, and never runs a "
            "dataset's own script.",
        )
    if wanted.path:
        return _named(wanted, names)
    sets = _from_card(info, names) or _from_names(names)
    training = [files for (_, split), files in sets.items() if split == "train"]
    if len(training) == 1:
        return training[0]
    if len(sets) == 1:
        return next(iter(sets.values()))
    raise InputError(
        f"{wanted.repository} has {len(sets)} sets of data, and it is not clear which is meant: "
        f"{_listed(wanted, sets)}.",
        "Give one of these addresses.",
    )


def _named(wanted: _Wanted, names: list[str]) -> list[str]:
    path = wanted.path
    found = [name for name in names if name == path or name.startswith(f"{path}/")]
    found = found or [name for name in names if fnmatchcase(name, path)]
    if not found:
        raise InputError(
            f"{wanted.repository} has no data file {path!r}.",
            f"It has {', '.join(names[:_MAX_LISTED])}{' ...' if len(names) > _MAX_LISTED else ''}.",
        )
    return sorted(found)


def _from_card(info: DatasetInfo, names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return the files by (config, split) as the dataset's card lists them."""
    card: dict[str, Any] = vars(info.card_data) if info.card_data else {}
    found: dict[tuple[str, str], list[str]] = {}
    for config in _items(card.get("configs")):
        for entry in _items(config.get("data_files")):
            paths = entry.get("path")
            patterns = [paths] if isinstance(paths, str) else paths
            if isinstance(patterns, list):
                key = (str(config.get("config_name", "")), str(entry.get("split", "")))
                files = {n for n in names for p in patterns if n == p or fnmatchcase(n, str(p))}
                found[key] = sorted(files)
    return {key: files for key, files in found.items() if files}


def _items(value: object) -> list[dict[str, Any]]:
    """Return the objects of a list in a card, which people write by hand."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _from_names(names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return the files by (folder, split) as their names tell; without a word for it: train."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        words = re.split(r"[^a-z]+", name.lower())
        splits = [split for split, known in _SPLITS.items() if set(words) & set(known)]
        folders = [part for part in name.split("/")[:-1] if part not in ("data", *_all_words())]
        found.setdefault(("/".join(folders), splits[0] if splits else "train"), []).append(name)
    return found


def _all_words() -> list[str]:
    return [word for words in _SPLITS.values() for word in words]


def _listed(wanted: _Wanted, sets: dict[tuple[str, str], list[str]]) -> str:
    shown = [
        f"{' '.join(filter(None, key))}: {PREFIX}{wanted.repository}/{_pattern(files)}"
        + (f"@{wanted.revision}" if wanted.revision else "")
        for key, files in sets.items()
    ]
    more = f"; and {len(shown) - _MAX_LISTED} more" if len(shown) > _MAX_LISTED else ""
    return "; ".join(shown[:_MAX_LISTED]) + more


def _pattern(files: Sequence[str]) -> str:
    """Return one name, or a pattern for several: what they begin and end with."""
    if len(files) == 1:
        return files[0]
    first, last = min(files), max(files)
    same = next(i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return f"{first[:same]}*{PurePosixPath(first).suffix}"


# ---- what came --------------------------------------------------------------------------------


def _moved(path: Path, folder: Path) -> Path:
    """Move a file out of the library's folder; two files of one name stay two."""
    target = folder / path.name
    number = 1
    while target.exists():
        number += 1
        target = folder / f"{number}-{path.name}"
    return path.rename(target)


def _name(wanted: _Wanted, files: list[str]) -> str:
    name = wanted.repository.partition("/")[2]
    return f"{name} {PurePosixPath(files[0]).name}" if wanted.path and len(files) == 1 else name


def _origin(wanted: _Wanted, commit: str, files: list[str]) -> dict[str, str]:
    path = f"/{wanted.path}" if wanted.path else ""
    return {
        "kind": "hub",
        "source": f"{PREFIX}{wanted.repository}{path}@{commit}",
        "repository": wanted.repository,
        "revision": commit,
        "files": ", ".join(files),
    }


@contextmanager
def _hub_errors(wanted: _Wanted) -> Iterator[None]:
    """Translate what huggingface_hub raises; its texts hold addresses that may carry signatures."""
    try:
        yield
    except GatedRepoError as error:
        raise MachineError(
            f"The hub lets only people who accepted its terms download {wanted.repository}.",
            "Accept them on the dataset's page, then run `hf auth login` where the page runs.",
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(
            f"{wanted.repository} has no revision {wanted.revision!r}.",
            "Give a branch, tag or commit of the repository, or leave it out.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFoundError(
            f"There is no dataset {wanted.repository!r} on the Hugging Face hub, or it is private.",
            "Correct the id; for a private one run `hf auth login` where the page runs. A file "
            "on this machine is named by its absolute path.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable() from error
    except EntryNotFoundError as error:
        raise NotFoundError(
            f"A file of {wanted.repository} is gone from the hub.", "Try again."
        ) from error
    except HfHubHTTPError as error:
        raise MachineError(
            f"The Hugging Face hub refused {wanted.repository} "
            f"(answer {error.response.status_code}).",
            "Try again later.",
        ) from error
    except (HTTPError, ConnectionError) as error:  # the latter: HF_HUB_OFFLINE=1
        raise _unreachable() from error


def _unreachable() -> MachineError:
    return MachineError(
        "The Hugging Face hub cannot be reached.",
        "Connect this machine to the network, or upload the file.",
    )
