"""Tasks: read row -> claim -> launch -> follow -> record. Rung by name from studio.dispatch."""

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from studio.disk import OrderFolder, RunFolder, write_whole
from studio.domain.orders import ChatOrder, MergeOrder
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.errors import StudioError
from studio.store import leases
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from workers import follow, launcher
from workers.app import Shop, app, shop
from workers.supervise import News, end, supervise

logger = logging.getLogger(__name__)

MAX_LIVE_RUNS = 1
MAX_LIVE_MERGES = 1
MAX_LIVE_CHATS = 2
CHAT_IDLE_SECONDS = 15 * 60.0

_Row = TypeVar("_Row", bound=JobRow)


@app.task(name="workers.tasks.train")
def train() -> None:
    """Train queued Runs, one after the other, until none is left."""
    here = shop()
    while (row := _claim(here, RunRow, MAX_LIVE_RUNS)) is not None:
        _guarded(here, row, _train)


@app.task(name="workers.tasks.merge")
def merge() -> None:
    """Execute queued Merges, one after the other, until none is left."""
    here = shop()
    while (row := _claim(here, ArtifactRow, MAX_LIVE_MERGES)) is not None:
        _guarded(here, row, _merge)


@app.task(name="workers.tasks.serve")
def serve() -> None:
    """Serve one queued Chat until it is closed or nobody has used it for a while."""
    here = shop()
    row = _claim(here, ChatRow, MAX_LIVE_CHATS)
    if row is not None:
        _guarded(here, row, _serve)


def _claim(here: Shop, table: type[_Row], max_live: int) -> _Row | None:
    with here.database.write() as session:
        if here.refusing.is_set():
            return None
        return leases.claim(session, table, owner=here.owner, now=time.time(), max_live=max_live)


def _lease(row: JobRow) -> leases.Lease:
    return leases.Lease(table=type(row), id=row.id, epoch=row.epoch, owner=str(row.owner))


def _guarded(here: Shop, row: _Row, work: Callable[[Shop, _Row], None]) -> None:
    """Run a task; whatever goes wrong is written on the row, in words."""
    lease = _lease(row)
    try:
        work(here, row)
    except StudioError as error:
        _fail(here, lease, _words(error))
    except Exception as error:
        logger.exception("%s failed", lease.mark)
        _fail(
            here,
            lease,
            {
                "type": type(error).__name__,
                "message": f"The worker failed: {error}.",
                "hint": "This is a fault of the studio; worker.log in the home folder has more.",
            },
        )
        raise


def _words(error: StudioError) -> dict[str, str]:
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "field": error.field,
    }


def _is_stopping(here: Shop, row: JobRow) -> bool:
    with here.database.read() as session:
        current = session.get(type(row), row.id)
    return current is not None and current.state == RunState.STOPPING


def _fail(here: Shop, lease: leases.Lease, words: dict[str, Any]) -> None:
    end(here, lease, RunState.FAILED, {"error": words, "stage": ""})


# ---- train ------------------------------------------------------------------------------------


def _train(here: Shop, row: RunRow) -> None:
    lease, folder = _lease(row), here.home.run(row.id)
    spec = JobSpec.model_validate(row.spec)
    launcher.prepare_run(folder, spec)
    process = launcher.launch(
        launcher.trainer_command(folder.path, spec.train.num_gpus),
        mark=lease.mark,
        log=folder.log,
        threads=here.settings.cpu_threads,
    )
    follower = follow.Follower(folder.metrics)
    exit_code = supervise(here, lease, process, lambda: _run_news(folder, follower))
    if exit_code is None:
        return
    how = launcher.outcome(exit_code, result=folder.result, error=folder.error)
    if how.is_unexplained and _is_stopping(here, row):
        # Asked to stop while it was still starting: it cannot take heed yet, and learned nothing.
        end(here, lease, RunState.STOPPED, {"stage": ""})
    elif how.error is not None:
        _fail(here, lease, how.error)
    else:
        reached = RunState((how.result or {}).get("state", RunState.STOPPED))
        end(here, lease, reached, {"result": how.result, "stage": ""})


def _run_news(folder: RunFolder, follower: follow.Follower) -> News:
    records = follower.read()
    values: dict[str, Any] = {"stage": _stage(folder.stage).get("stage", "starting")}
    if records:
        values["step"] = records[-1].step
        values["total_steps"] = records[-1].total_steps
    return News(values=values, points=follow.points(records))


def _stage(path: Path) -> dict[str, Any]:
    return launcher.read_json(path) or {}


def _method(run: RunRow) -> str:
    """Return how a run held its base: where its spec left that open, the engine has decided."""
    result = run.result or {}
    return str(result.get("method", run.spec["method"]))


# ---- merge ------------------------------------------------------------------------------------


def _merge(here: Shop, row: ArtifactRow) -> None:
    lease, folder = _lease(row), here.home.merge(row.id)
    spec = JobSpec.model_validate(row.run.spec)
    run, is_full = here.home.run(row.run_id), _method(row.run) == "full"
    order = MergeOrder(
        model=spec.model,
        adapter=None if is_full else str(run.adapter),
        trained=str(run.model) if is_full else None,
        run_id=row.run_id,
    )
    process = _start(here, "workers.merge", folder, lease, order.model_dump_json(indent=2))
    exit_code = supervise(here, lease, process, lambda: _order_news(folder, with_fraction=True))
    if exit_code is None:
        return
    how = launcher.outcome(exit_code, result=folder.certificate, error=folder.error)
    if how.error is not None or how.result is None:
        _fail(here, lease, how.error or {"type": "Unexplained", "message": "No certificate."})
        return
    size = sum(file.stat().st_size for file in folder.weights.iterdir() if file.is_file())
    end(
        here,
        lease,
        RunState.FINISHED,
        {"certificate": how.result, "size_bytes": size, "fraction": 1.0, "stage": ""},
    )


# ---- chat -------------------------------------------------------------------------------------


def _serve(here: Shop, row: ChatRow) -> None:
    lease, folder = _lease(row), here.home.chat(row.id)
    spec = JobSpec.model_validate(row.run.spec)
    run, method = here.home.run(row.run_id), _method(row.run)
    merged = None if row.artifact_id is None else str(here.home.merge(row.artifact_id).weights)
    if merged is None and method == "full":
        merged = str(run.model)
    order = ChatOrder(
        model=spec.model,
        method=method,
        adapter=str(run.adapter) if merged is None else None,
        merged=merged,
        run_id=row.run_id,
        token=row.token,
    )
    process = _start(here, "workers.chat", folder, lease, order.model_dump_json(indent=2))
    exit_code = supervise(here, lease, process, lambda: _chat_news(here, folder, lease))
    if exit_code is None:
        return
    if _is_stopping(here, row):
        end(here, lease, RunState.STOPPED, {"port": None})
        return
    how = launcher.outcome(exit_code, result=folder.ready, error=folder.error)
    words = how.error or {
        "type": "Unexplained",
        "message": f"The chat process ended by itself with code {exit_code}.",
        "hint": "Open the chat again; its log is in the home folder.",
    }
    end(here, lease, RunState.FAILED, {"error": words, "port": None})


def _chat_news(here: Shop, folder: OrderFolder, lease: leases.Lease) -> News:
    news = _order_news(folder, with_fraction=False)
    ready = launcher.read_json(folder.ready)
    if ready is not None:
        news.values["port"] = int(ready["port"])
        news.values["stage"] = "ready"
    with here.database.read() as session:
        row = session.get(ChatRow, lease.id)
        idle = row is not None and time.time() - row.last_used_at > CHAT_IDLE_SECONDS
    if idle or here.closing.is_set():
        with here.database.write() as session:
            leases.move(session, ChatRow, lease.id, RunState.STOPPING, now=time.time())
    return news


def _start(
    here: Shop, module: str, folder: OrderFolder, lease: leases.Lease, order: str
) -> subprocess.Popen[bytes]:
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in (folder.ready, folder.error, folder.certificate):
        old.unlink(missing_ok=True)
    write_whole(folder.order, order + "\n")
    return launcher.launch(
        launcher.module_command(module, folder.path),
        mark=lease.mark,
        log=folder.log,
        threads=here.settings.cpu_threads,
    )


def _order_news(folder: OrderFolder, *, with_fraction: bool) -> News:
    stage = _stage(folder.stage)
    values: dict[str, Any] = {"stage": stage.get("stage", "starting")}
    if with_fraction:
        values["fraction"] = float(stage.get("fraction", 0.0))
    return News(values=values)
