"""Where base weights come from: the Hugging Face hub or a folder, and what is refused there.

Not covered: weights that are quantised already (FP8, NVFP4), code of a repository (never run).
"""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from studio.domain.spec import ModelRef
from studio.domain.targets import text_config
from studio.errors import InputError
from studio.hub import hub_errors

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def download(model: ModelRef) -> Path:
    """Download base weights, or find them in the hub's cache on this machine.

    Raises:
        NotFoundError: There is no such repository or revision.
        InputError: The repository holds no model that the studio trains, or no safetensors.
        EngineError: The hub cannot be reached or refuses access.
    """
    with hub_errors(model.id, model.revision):
        # The configuration first: a wrong architecture shall not cost a download of 160 GB.
        config = hf_hub_download(model.id, "config.json", revision=model.revision)
        _check_config(Path(config), model.id)
        folder = snapshot_download(model.id, revision=model.revision, allow_patterns=_HUB_FILES)
    return check_folder(Path(folder), model.id)


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
