"""Base weights of the Hugging Face hub: looked at before they are fetched, fetched once.

Only safetensors, JSON, templates and tokenizer files are fetched: no code, no pickles.
"""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from httpx2 import HTTPError  # what huggingface_hub >= 2 lets through when the network fails
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling

from studio.domain.outcome import ExitCode
from studio.domain.spec import ModelRef
from studio.errors import EngineError, MachineError, disk_errors
from studio.hub import hub_errors
from workers.engine.check_model import check_config, check_folder, no_weights

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]
_GIB = 2**30


def download(model: ModelRef, endpoint: str | None = None) -> Path:
    """Download base weights, or find them in the hub's cache on this machine.

    Args:
        model: A hub id with its revision.
        endpoint: Address of the hub; None takes that of huggingface_hub's own settings.

    Raises:
        NotFoundError: There is no such repository or revision.
        InputError: The repository holds no model that the studio trains, or no safetensors.
        EngineError: The hub cannot be reached or refuses access.
        MachineError: The disk has not the room.
    """
    try:
        with hub_errors(model.id, model.revision), disk_errors(f"downloading {model.id}"):
            folder = _fetch(model, endpoint)
    except EngineError as error:
        # Whoever has not accepted the terms will be refused again; a network comes back.
        if not isinstance(error.__cause__, GatedRepoError):
            error.code = ExitCode.RETRY
        raise
    return check_folder(folder, model.id)


def _fetch(model: ModelRef, endpoint: str | None) -> Path:
    # The configuration first: a wrong architecture shall not cost a download of 160 GB.
    config = hf_hub_download(model.id, "config.json", revision=model.revision, endpoint=endpoint)
    check_config(Path(config), model.id)
    _look_ahead(model, endpoint)
    folder = snapshot_download(
        model.id, revision=model.revision, allow_patterns=_HUB_FILES, endpoint=endpoint
    )
    return Path(folder)


def _look_ahead(model: ModelRef, endpoint: str | None) -> None:
    """Refuse what the list of files shows to be wrong, as far as the hub can be asked for it."""
    try:
        info = HfApi(endpoint=endpoint).model_info(
            model.id, revision=model.revision, files_metadata=True
        )
    # Without a network the files may be here already.
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled):
        return
    files = list(info.siblings or ())
    names = [file.rfilename for file in files]
    if not any(fnmatch(name, "*.safetensors") for name in names):
        raise no_weights(names, model.id)
    _refuse_without_room(model.id, files)


def _refuse_without_room(model_id: str, files: Iterable[RepoSibling]) -> None:
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    # What is here already is kept under its hash and not fetched again.
    repository = cache / f"models--{model_id.replace('/', '--')}"
    here = sum(blob.stat().st_size for blob in repository.glob("blobs/*"))
    needed = sum(
        file.size or 0
        for file in files
        if any(fnmatch(file.rfilename, pattern) for pattern in _HUB_FILES)
    )
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed - here > free:
        raise MachineError(
            f"{model_id} needs {(needed - here) / _GIB:,.1f} GiB on the disk, and {cache} has "
            f"{free / _GIB:,.1f} GiB left.",
            "Free some space, or set HF_HOME to a folder on a larger disk.",
            "model.id",
        )
