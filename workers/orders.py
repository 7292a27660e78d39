"""Execute one Merge or one Chat: order on disk, process, news of it, end."""

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

from studio.disk import OrderFolder, write_whole
from studio.domain.orders import ChatOrder, MergeOrder
from studio.domain.outcome import is_retried
from studio.domain.retry import after_crash
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.errors import MachineError
from studio.store import leases
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from workers import launcher
from workers.app import Shop
from workers.sharing import fetch_trained, hand_over_merge, holding
from workers.supervise import News, Work, again, end, supervise, surely

logger = logging.getLogger(__name__)

CHAT_IDLE_SECONDS = 15 * 60.0


def merge(here: Shop, row: ArtifactRow) -> None:
    """Merge a Run's Adapter into its base, and store the Certificate."""
    lease, folder = leases.lease_of(row), here.home.merge(row.id)
    spec = JobSpec.model_validate(row.run.spec)
    run, is_full = here.home.run(row.run_id), _method(row.run) == "full"
    order = MergeOrder(
        model=spec.model,
        adapter=None if is_full else str(run.adapter),
        trained=str(run.model) if is_full else None,
        run_id=row.run_id,
    )
    with holding(here, lease, "copying files"):
        fetch_trained(here, run)
    process = _start(here, "workers.merge", folder, lease, order.model_dump_json(indent=2))
    work = Work(lease=lease, process=process, look=lambda: _order_news(folder, with_fraction=True))
    exit_code = supervise(here, work)
    if exit_code is None:
        return
    how = launcher.outcome(exit_code, result=folder.certificate, error=folder.error)
    if how.result is None or how.error is not None:
        _not_merged(here, row, how)
        return
    with holding(here, lease, "copying files"):
        surely(here, lambda: hand_over_merge(here, folder))
    size = sum(file.stat().st_size for file in folder.weights.iterdir() if file.is_file())
    values = {"certificate": how.result, "size_bytes": size, "fraction": 1.0, "stage": ""}
    end(here, lease, RunState.FINISHED, values)


def _not_merged(here: Shop, row: ArtifactRow, how: launcher.Outcome) -> None:
    lease = leases.lease_of(row)
    if here.closing.is_set() and how.is_unexplained:
        text = "The worker was closed; the merge starts anew when one is there."
        again(here, lease, kind="interrupted", text=text)
        return
    words = how.error or {"type": "Unexplained", "message": "No certificate."}
    attempts = after_crash(leases.attempts_of(row), 0) if is_retried(how.code) else None
    if attempts is None:
        end(here, lease, RunState.FAILED, {"error": words, "stage": ""})
    else:
        text = f"{words['message']} It is tried once more."
        again(here, lease, kind="crashed", text=text, attempts=attempts)


def serve(here: Shop, row: ChatRow) -> None:
    """Serve a Chat until it is closed or nobody has used it for a while."""
    lease, folder = leases.lease_of(row), here.home.chat(row.id)
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
        host=here.settings.chat_host,
    )
    with holding(here, lease, "copying files"):
        if row.artifact_id is not None:
            here.files.pull(here.home.merge(row.artifact_id).weights)
        else:
            fetch_trained(here, run)
    process = _start(here, "workers.chat", folder, lease, order.model_dump_json(indent=2))
    work = Work(lease=lease, process=process, look=lambda: _chat_news(here, folder, lease))
    exit_code = supervise(here, work)
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


def _method(run: RunRow) -> str:
    """Return how a run held its base: where its spec left that open, the engine has decided."""
    result = run.result or {}
    return str(result.get("method", run.spec["method"]))


def _is_stopping(here: Shop, row: JobRow) -> bool:
    with here.database.read() as session:
        current = session.get(type(row), row.id)
    return current is not None and current.state == RunState.STOPPING


def _chat_news(here: Shop, folder: OrderFolder, lease: leases.Lease) -> News:
    news = _order_news(folder, with_fraction=False)
    ready = launcher.read_json(folder.ready)
    if ready is not None:
        news.values["port"] = int(ready["port"])
        news.values["stage"] = "ready"
    try:
        _close_idle(here, lease)
    except MachineError as error:
        logger.error("%s: %s", lease.mark, error)  # asked again at the next look
    return news


def _close_idle(here: Shop, lease: leases.Lease) -> None:
    with here.database.read() as session:
        row = session.get(ChatRow, lease.id)
        idle = row is not None and time.time() - row.last_used_at > CHAT_IDLE_SECONDS
    if idle or here.closing.is_set():
        with here.database.write() as session:
            leases.move(session, ChatRow, lease.id, RunState.STOPPING)


def _start(
    here: Shop, module: str, folder: OrderFolder, lease: leases.Lease, order: str
) -> subprocess.Popen[bytes]:
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in (folder.ready, folder.error, folder.certificate, folder.stage):
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


def _stage(path: Path) -> dict[str, Any]:
    return launcher.read_json(path) or {}
