"""Verbs of Merges: order one, look at it and at its Certificate."""

import time
from collections.abc import Sequence
from pathlib import Path

from studio.dispatch import Bell
from studio.domain.certificate import Certificate
from studio.domain.run import RunState
from studio.errors import ConflictError, NotFoundError
from studio.services import runs, shared
from studio.services.studio import Studio
from studio.store import artifacts as store
from studio.store.rows import ArtifactRow, RunRow

MAX_LISTED = 200


def has_result(studio: Studio, run: RunRow) -> bool:
    """Whether a Run has left an Adapter, or a whole model when all of it was trained."""
    return RunState(run.state).is_final and shared.has_result(studio, run.id)


def require_result(studio: Studio, run_id: int) -> RunRow:
    """Return a Run that has an Adapter or a whole model.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It has neither.
    """
    run = runs.get(studio, run_id)
    if not has_result(studio, run):
        raise ConflictError(
            f"Run {run_id} is {run.state} and has learned nothing yet.",
            "Launch it again and let it take a step."
            if RunState(run.state).is_final
            else "Wait until it has finished, or stop it to keep what it has learned so far.",
        )
    return run


def merge(studio: Studio, run_id: int) -> ArtifactRow:
    """Order the Merge of a Run's Adapter into its base, or the certified copy of its whole model.

    Returns:
        The Merge, QUEUED; or the one that is there already, unless that failed.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: The Run has learned nothing yet.
    """
    require_result(studio, run_id)
    with studio.database.write() as session:
        for row in store.of_run(session, run_id):
            if row.state not in (RunState.FAILED, RunState.STOPPED):
                return row
        row = ArtifactRow(run_id=run_id, state=RunState.QUEUED, created_at=time.time())
        session.add(row)
    studio.dispatch.ring(Bell.MERGE)
    return get(studio, row.id)


def get(studio: Studio, artifact_id: int) -> ArtifactRow:
    """Return a Merge.

    Raises:
        NotFoundError: There is no such Merge.
    """
    with studio.database.read() as session:
        row = session.get(ArtifactRow, artifact_id)
    if row is None:
        raise NotFoundError(f"There is no merge {artifact_id}.", "The Artifacts page lists all.")
    return row


def listing(studio: Studio) -> Sequence[ArtifactRow]:
    """Return the newest Merges, newest first."""
    with studio.database.read() as session:
        return store.listing(session, MAX_LISTED)


def finished(studio: Studio) -> Sequence[ArtifactRow]:
    """Return the Merges whose weights are ready, newest first."""
    with studio.database.read() as session:
        return store.finished(session)


def certificate(row: ArtifactRow) -> Certificate | None:
    """Return the Certificate of a Merge; None before it has finished."""
    return None if row.certificate is None else Certificate.model_validate(row.certificate)


def weights(studio: Studio, row: ArtifactRow) -> Path:
    """Return the folder of the merged model."""
    return studio.home.merge(row.id).weights
