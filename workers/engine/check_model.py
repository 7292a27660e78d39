"""What can be known of a base model before memory is taken: its config and the heads of its files.

Only config.json, the index and the headers of the safetensors are read, some kilobytes a file.
Nothing of a folder is ever run: neither its Python files nor pickles.
Header of a safetensors file: 8 bytes of length, then JSON
(https://huggingface.co/docs/safetensors#format).
Not covered: whether the bytes of the weights are the published ones.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from studio.disk import TEMPLATES
from studio.domain.architecture import read_architecture, text_config
from studio.domain.shapes import check_shapes
from studio.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FIELD = "model.id"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 10**8  # the format's own limit
_SIXTEEN_BIT_OR_MORE = {"BF16", "F16", "F32", "F64"}
_AGAIN = "Download all files of the model again."
_TEMPLATES = {
    "qwen3_next": "qwen3-next-instruct.jinja",
    "qwen3_5_text": "qwen3.5.jinja",
    "qwen3_5_moe_text": "qwen3.5.jinja",
    "qwen3": "qwen3.jinja",
    "qwen3_moe": "qwen3.jinja",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHead:
    """What the header of a file says of one tensor.

    Attributes:
        shape: Its sizes.
        dtype: As safetensors writes it, as in `BF16`.
    """

    shape: tuple[int, ...]
    dtype: str


def check_folder(folder: Path, name: str) -> Path:
    """Return `folder` if it holds whole 16-bit safetensors weights that the studio trains.

    Args:
        folder: A Hugging Face model folder.
        name: What the user called it, for the error sentence.

    Raises:
        InputError: It does not; the sentence says what is wrong with which file.
    """
    config = check_config(folder / "config.json", name)
    heads = read_heads(folder, name)
    _refuse_quantised(heads, name)
    check_shapes(read_architecture(config), {key: head.shape for key, head in heads.items()})
    _check_tokenizer(folder, name)
    return folder


def check_config(path: Path, name: str) -> dict[str, Any]:
    """Return a model's config.json if the studio can train such a model.

    Raises:
        InputError: It cannot be read, the architecture is another, the weights are quantised, or
            the model needs code of its repository.
    """
    config = _read_json(path, f"{name} has no readable config.json.")
    _refuse_code(config, "config.json", name)
    read_architecture(config)
    inner = config.get("text_config")
    quantized = config.get("quantization_config") or (
        inner.get("quantization_config") if isinstance(inner, dict) else None
    )
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise _quantised(name, method)
    return config


def read_heads(folder: Path, name: str) -> dict[str, TensorHead]:
    """Return shape and dtype of every tensor of a model.

    Raises:
        InputError: There are no safetensors, one of the index is missing, or one is damaged.
    """
    listed: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX, name)
        files = sorted(set(listed.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise no_weights((path.name for path in folder.iterdir()), name)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{name} lacks {len(missing)} of {len(files)} weight files, the first is {missing[0]}.",
            _AGAIN,
            _FIELD,
        )
    heads: dict[str, TensorHead] = {}
    for file in files:
        heads.update(_read_head(folder / file, name))
    absent = sorted(set(listed or ()) - set(heads))
    if absent:
        raise InputError(
            f"{name} lacks {len(absent)} tensors that its index names, the first is {absent[0]}.",
            _AGAIN,
            _FIELD,
        )
    return heads


def template_for(folder: Path) -> Path | None:
    """Return the chat template of the family for a model that has none of its own.

    Returns:
        A file under templates/chat; None where the model has a template, or the studio none.
    """
    if (folder / "chat_template.jinja").is_file():
        return None
    try:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = text_config(config)["model_type"]
    except (OSError, ValueError, AttributeError, InputError):
        return None
    if not isinstance(tokenizer, dict) or tokenizer.get("chat_template"):
        return None
    template = TEMPLATES / "chat" / _TEMPLATES.get(kind, "none.jinja")
    return template if template.is_file() else None


# ---- what is refused --------------------------------------------------------------------------


def _refuse_code(values: dict[str, Any], file: str, name: str) -> None:
    if values.get("auto_map"):
        raise InputError(
            f"{name} wants Python code of its repository to be run (auto_map in its {file}).",
            "Such code is never run, and no setting allows it: choose weights that transformers "
            "reads by itself.",
            _FIELD,
        )


def _quantised(name: str, method: object) -> InputError:
    return InputError(
        f"The weights of {name} are quantised already ({method}).",
        "Choose the 16-bit weights; method qlora brings them to 4 bits while loading.",
        _FIELD,
    )


def _refuse_quantised(heads: dict[str, TensorHead], name: str) -> None:
    for tensor, head in heads.items():
        if head.dtype not in _SIXTEEN_BIT_OR_MORE and tensor.endswith((".weight", "_proj")):
            raise _quantised(name, f"{tensor} is {head.dtype}")


def _check_tokenizer(folder: Path, name: str) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{name} has no tokenizer.json.",
            "Put the tokenizer.json and tokenizer_config.json published with the weights there.",
            _FIELD,
        )
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = _read_json(path, f"{name} has no readable tokenizer_config.json.")
        _refuse_code(values, path.name, name)


def no_weights(files: Iterable[str], name: str) -> InputError:
    """Return what is wrong with a model that has no weights which can be read.

    Args:
        files: Names of all its files.
        name: What the user called it.
    """
    files = sorted(files)
    others = [file for file in files if fnmatch(file, "*.safetensors")]
    if others:
        return InputError(
            f"{name} has neither {SINGLE} nor {INDEX}, but {', '.join(others[:3])}.",
            "Give the folder of a whole model; an Adapter alone is none.",
            _FIELD,
        )
    if any(fnmatch(file, pattern) for file in files for pattern in _PICKLES):
        return InputError(
            f"The weights of {name} are pickle files, which can run code when they are read.",
            "Convert them to safetensors, or choose a repository that has them.",
            _FIELD,
        )
    return InputError(
        f"{name} holds no *.safetensors weights.", "Download all files of the model.", _FIELD
    )


# ---- files --------------------------------------------------------------------------------------


def _read_json(path: Path, message: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(message, "Give a folder in the layout of transformers.", _FIELD) from error
    if not isinstance(values, dict):
        raise InputError(message, "Give a folder in the layout of transformers.", _FIELD)
    return values


def _weight_map(index: Path, name: str) -> dict[str, str]:
    listed = _read_json(index, f"{name} has no readable {INDEX}.").get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(file, str) and _is_plain(file) for file in listed.values())
    ):
        raise InputError(f"{name} has no readable {INDEX}.", _AGAIN, _FIELD)
    return listed


def _is_plain(file: str) -> bool:
    return file == Path(file).name and file.endswith(".safetensors")


def _read_head(path: Path, name: str) -> dict[str, TensorHead]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        heads = {
            key: TensorHead(shape=tuple(map(int, value["shape"])), dtype=str(value["dtype"]))
            for key, value in header.items()
        }
        end = 8 + length + max((int(v["data_offsets"][1]) for v in header.values()), default=0)
    except OSError as error:
        raise InputError(
            f"{path.name} of {name} cannot be read: {error.strerror}.", _AGAIN, _FIELD
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path.name} of {name} is no whole safetensors file.", _AGAIN, _FIELD
        ) from error
    if end != size:
        raise InputError(
            f"{path.name} of {name} has {size:,} bytes, but its header says {end:,}.",
            _AGAIN,
            _FIELD,
        )
    return heads
