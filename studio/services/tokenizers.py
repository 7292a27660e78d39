"""Where the tokenizer and the chat template of a base model lie, without its weights."""

from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from studio.domain.spec import ModelRef
from studio.errors import InputError, NotFoundError
from studio.hub import hub_errors
from studio.services.studio import Studio
from studio.tokens.tiny import ensure_tiny_tokenizer

REQUIRED = "tokenizer.json"
# A person waits for the answer.
HUB_SECONDS = 4.0
FILES = (REQUIRED, "tokenizer_config.json", "chat_template.jinja")


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Return the models that a Dataset can be read as, as (title, id); those at hand first.

    A hub model is at hand when its tokenizer was downloaded before.
    """
    found = [
        (_is_at_hand(model_id), known.title, model_id) for model_id, known in studio.models.items()
    ]
    found.sort(key=lambda item: not item[0])
    return [
        (title if is_here else f"{title} (tokenizer not downloaded yet)", model_id)
        for is_here, title, model_id in found
    ]


def folder_of(studio: Studio, model: ModelRef) -> Path:
    """Return a folder with tokenizer.json and chat template of a base model.

    Args:
        studio: The installation.
        model: A tiny model, the path of a Hugging Face folder, or a hub id; the hub is asked for
            three small files.

    Raises:
        NotFoundError: There is no such model, folder or repository.
        InputError: It has no tokenizer.json.
        MachineError: The disk is full.
        EngineError: The hub cannot be reached or refuses access.
    """
    known = studio.models.get(model.id)
    if known is not None and known.is_built_here:
        return ensure_tiny_tokenizer(known, studio.home.tiny_tokenizer(known.id))
    if model.id.startswith(("/", "~", ".")):
        return _local(Path(model.id).expanduser(), model.id)
    if model.id.startswith("tiny/"):
        there = ", ".join(name for name in studio.models if name.startswith("tiny/"))
        raise NotFoundError(
            f"There is no tiny model {model.id!r}.", f"Choose one of: {there}.", "model.id"
        )
    return _download(model)


def _is_at_hand(model_id: str) -> bool:
    if model_id.startswith("tiny/"):
        return True
    return isinstance(try_to_load_from_cache(model_id, REQUIRED), str)


def _local(folder: Path, name: str) -> Path:
    if not (folder / REQUIRED).is_file():
        raise InputError(
            f"{name} holds no {REQUIRED}.",
            "Give a model folder in Hugging Face's layout, with its fast tokenizer.",
            "model.id",
        )
    return folder


def _download(model: ModelRef) -> Path:
    with hub_errors(model.id, model.revision):
        first = Path(
            hf_hub_download(model.id, REQUIRED, revision=model.revision, etag_timeout=HUB_SECONDS)
        )
        for name in FILES[1:]:
            try:
                # The commit of the first file, so that all three are of one version.
                hf_hub_download(model.id, name, revision=first.parent.name)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue  # an older repository keeps its template in tokenizer_config.json
    return first.parent
