"""Where base weights come from: the Hugging Face hub or a folder, and what is refused there.

Not covered: weights that are quantised already (FP8, NVFP4), code of a repository (never run).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from studio.domain.spec import ModelRef
from studio.domain.targets import text_config
from studio.errors import EngineError, InputError, NotFoundError

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def download(model: ModelRef) -> Path:
    """Download base weights, or find them in the hub's cache on this machine.

    Raises:
        NotFoundError: There is no such repository or revision.
        InputError: The repository holds no model that the studio trains, or no safetensors.
        EngineError: The hub cannot be reached or refuses access.
    """
    with _hub_errors(model):
        # The configuration first: a wrong architecture shall not cost a download of 160 GB.
        config = hf_hub_download(model.id, "config.json", revision=model.revision)
        _check_config(Path(config), model.id)
        folder = snapshot_download(model.id, revision=model.revision, allow_patterns=_HUB_FILES)
    return check_folder(Path(folder), model.id)


@contextmanager
def _hub_errors(model: ModelRef) -> Iterator[None]:
    """Translate what huggingface_hub raises into sentences; the only place that knows its errors."""
    try:
        yield
    except GatedRepoError as error:
        raise EngineError(
            f"The hub lets only people who accepted its terms download {model.id}.",
            "Accept them on the model's page, then run `hf auth login` on the worker's machine.",
            "model.id",
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(
            f"{model.id} has no revision {model.revision!r}.",
            "Give a branch, tag or commit of the repository, or leave the field empty.",
            "model.revision",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFoundError(
            f"There is no model {model.id!r} on the Hugging Face hub, or it is private.",
            "Correct the id; for a private model run `hf auth login` on the worker's machine.",
            "model.id",
        ) from error
    except LocalEntryNotFoundError as error:
        raise EngineError(
            f"{model.id} is not on this machine and the Hugging Face hub cannot be reached.",
            "Connect the worker to the network, or give the path of a folder with the weights.",
            "model.id",
        ) from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{model.id} on the hub has no config.json.",
            "Choose a repository in the layout of transformers.",
            "model.id",
        ) from error
    except HfHubHTTPError as error:
        first_line = str(error).strip().splitlines()[0]
        raise EngineError(
            f"The Hugging Face hub refused the download of {model.id}: {first_line}",
            "Try again later, or give the path of a folder with the weights.",
            "model.id",
        ) from error


def check_folder(folder: Path, name: str) -> Path:
    """Return `folder` if it holds 16-bit safetensors weights of a family that the studio trains.

    Args:
        folder: A Hugging Face model folder.
        name: What the user called it, for the error sentence.

    Raises:
        InputError: It does not.
    """
    _check_config(folder / "config.json", name)
    if any(folder.glob("*.safetensors")):
        return folder
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise InputError(
            f"The weights of {name} are pickle files, which can run code when they are read.",
            "Convert them to safetensors, or choose a repository that has them.",
            "model.id",
        )
    raise InputError(
        f"{name} holds no *.safetensors weights.", "Download all files of the model.", "model.id"
    )


def _check_config(path: Path, name: str) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} has no readable config.json.",
            "Give a folder in the layout of transformers.",
            "model.id",
        ) from error
    text_config(config)
    quantized = config.get("quantization_config")
    if quantized is not None:
        raise InputError(
            f"The weights of {name} are quantised already ({quantized.get('quant_method')}).",
            "Choose the 16-bit weights; method qlora brings them to 4 bits while loading.",
            "model.id",
        )
