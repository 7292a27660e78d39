"""What the Hugging Face hub answers when it does not give what was asked for, in sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from studio.errors import EngineError, InputError, NotFoundError


@contextmanager
def hub_errors(model_id: str, revision: str | None) -> Iterator[None]:
    """Translate what huggingface_hub raises while a model's files are fetched.

    Args:
        model_id: The repository.
        revision: Branch, tag or commit that was asked for; None for the newest.

    Raises:
        NotFoundError: There is no such repository or revision.
        InputError: The repository has no such file.
        EngineError: The hub cannot be reached or refuses access.
    """
    try:
        yield
    except GatedRepoError as error:
        raise EngineError(
            f"The hub lets only people who accepted its terms download {model_id}.",
            "Accept them on the model's page, then run `hf auth login` on the worker's machine.",
            "model.id",
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(
            f"{model_id} has no revision {revision!r}.",
            "Give a branch, tag or commit of the repository, or leave the field empty.",
            "model.revision",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFoundError(
            f"There is no model {model_id!r} on the Hugging Face hub, or it is private.",
            "Correct the id; for a private model run `hf auth login` on the worker's machine.",
            "model.id",
        ) from error
    except LocalEntryNotFoundError as error:
        raise EngineError(
            f"{model_id} is not on this machine and the Hugging Face hub cannot be reached.",
            "Connect the worker to the network, or give the path of a folder with the weights.",
            "model.id",
        ) from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{model_id} on the hub lacks a file that the studio needs: {_first_line(error)}",
            "Choose a repository in the layout of transformers.",
            "model.id",
        ) from error
    except HfHubHTTPError as error:
        raise EngineError(
            f"The Hugging Face hub refused the download of {model_id}: {_first_line(error)}",
            "Try again later, or give the path of a folder with the weights.",
            "model.id",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
