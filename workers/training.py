"""Execute one Run: fence what is left of earlier tries, launch, follow, record, try again."""

import json
import logging
import time
from functools import partial

from sqlalchemy.orm import Session

from studio.disk import RunFolder, write_whole
from studio.domain.outcome import ExitCode, is_retried
from studio.domain.retry import after_crash, after_loss
from studio.domain.run import RunState, Wish
from studio.domain.spec import JobSpec
from studio.errors import MachineError
from studio.store import leases
from studio.store.rows import JobRow, RunRow
from workers import follow, launcher
from workers.app import Shop
from workers.sharing import RunFiles, holding
from workers.slots import GivenUpError, SlotError, Taken
from workers.supervise import (
    News,
    Work,
    again,
    ended,
    queued_again,
    record,
    still_hold,
    supervise,
    surely,
)

logger = logging.getLogger(__name__)

SLOTS = "STUDIO_SLOTS"


def train(here: Shop, row: RunRow, taken: Taken) -> None:
    """Train a claimed Run until it ends, stops, or has to go on later.

    Args:
        here: This worker.
        row: The Run as it was claimed.
        taken: Its slots.

    Raises:
        StudioError: It could not be started.
        LeaseLostError: Another worker has it by now.
    """
    lease, folder = leases.lease_of(row), here.home.run(row.id)
    spec = JobSpec.model_validate(row.spec)
    files = RunFiles(here, folder, lease)
    taken.is_given_up = partial(_is_asked_to_stop, here, lease)
    try:
        with holding(here, lease, "waiting for the card to be free"):
            fence(lease, folder, taken)
    except GivenUpError:
        words = {"type": launcher.UNEXPLAINED, "message": "It had not begun."}
        _record(here, row, launcher.Outcome(exit_code=0, result=None, error=words))
        return
    except SlotError as error:
        again(here, lease, kind="waits", text=f"{error.message} It waits in the queue.")
        return
    with holding(here, lease, "copying files"):
        surely(here, lambda: files.fetch(spec))
    still_hold(here, lease)  # before anything of the next worker could be removed
    launcher.prepare_run(folder, spec)
    _require_origin(row, folder)
    write_whole(folder.owner, lease.mark)
    still_hold(here, lease)  # who has taken it over since then writes its own mark there
    launcher.head_log(folder.log, f"try {row.epoch}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    process = launcher.launch(
        here.command(folder.path, spec.train.num_gpus),
        mark=lease.mark,
        log=folder.log,
        threads=here.settings.cpu_threads,
        more=_environment(row, taken),
    )
    tails = Tails(folder, lease.epoch)
    work = Work(
        lease=lease,
        process=process,
        look=tails.look,
        heed=_Heed(folder, files).heed,
        hang_seconds=here.settings.hang_minutes * 60.0,
        hung=partial(_say_hung, folder),
    )
    exit_code = supervise(here, work)
    if exit_code is None:
        return
    with holding(here, lease, "copying files"):
        surely(here, files.hand_over)
    _record(here, row, launcher.outcome(exit_code, result=folder.result, error=folder.error))
    _see_memory(here, lease, taken)


def _require_origin(row: RunRow, folder: RunFolder) -> None:
    """See that a fork has something to begin from: without it, it would begin anew.

    Raises:
        MachineError: It has nothing.
    """
    own = folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step-*"))
    if row.parent_id is not None and not own and not folder.origin.is_dir():
        raise MachineError(
            f"The checkpoint of run {row.parent_id} that this run begins from is gone from its "
            f"folder {folder.origin}.",
            "Fork the other run once more.",
        )


def fence(lease: leases.Lease, folder: RunFolder, taken: Taken) -> None:
    """See that nothing of an earlier try is alive: its processes, and whatever is on its cards.

    Raises:
        SlotError: Something does not end.
        GivenUpError: The worker or the Run shall end meanwhile.
    """
    if folder.owner.exists():
        earlier = folder.owner.read_text(encoding="utf-8").strip()
        if earlier.startswith(f"runs:{lease.id}:") and earlier != lease.mark:
            launcher.kill_marked(earlier)
    taken.prove_free()


def _is_asked_to_stop(here: Shop, lease: leases.Lease) -> bool:
    try:
        with here.database.read() as session:
            row = session.get(lease.table, lease.id)
    except MachineError:
        row = None  # the next look asks again
    return here.closing.is_set() or (row is not None and row.state == RunState.STOPPING)


class Tails:
    """What a Run's engine writes while it works.

    Args:
        folder: The run folder.
        epoch: Of the Lease; a step that an earlier try began at says nothing now.
    """

    def __init__(self, folder: RunFolder, epoch: int) -> None:
        self._folder, self._epoch = folder, epoch
        self._metrics = follow.Follower(folder.metrics)
        self._events = follow.Tail(folder.events, follow.Event)

    def look(self) -> News:
        """Return what is new."""
        launcher.cut_log(self._folder.log)
        told = self._events.read()
        begun = [e.step for e in told if e.kind == "began" and e.epoch == self._epoch]
        if begun:
            # What was read until now may be of before; what it measured since then stands behind.
            self._metrics = follow.Follower(self._folder.metrics)
        records = self._metrics.read()
        stage = (launcher.read_json(self._folder.stage) or {}).get("stage", "starting")
        news = News(values={"stage": stage}, points=follow.points(records), events=told)
        if begun:
            news.begins_at = news.values["step"] = begun[-1] or 0
        if records:
            news.values["step"] = records[-1].step
            news.values["total_steps"] = records[-1].total_steps
        return news


class _Heed:
    """Passes on what a user wishes of a Run that works: a Checkpoint or an evaluation now."""

    def __init__(self, folder: RunFolder, files: RunFiles) -> None:
        self._folder, self._files = folder, files
        self._passed_on = (0, 0)

    def heed(self, row: JobRow) -> None:
        """Write the file that the engine looks at between steps."""
        assert isinstance(row, RunRow)
        self._files.offer()
        asked = (row.saves_asked, row.evaluations_asked)
        if asked != self._passed_on:
            values = {"saves": asked[0], "evaluations": asked[1]}
            write_whole(self._folder.wishes, json.dumps(values))
            self._passed_on = asked


def _environment(row: RunRow, taken: Taken) -> dict[str, str]:
    environment = {SLOTS: ":".join(str(path) for path in taken.ranks)}
    if row.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken.names)
    return environment


def _see_memory(here: Shop, lease: leases.Lease, taken: Taken) -> None:
    """Write into the history when a card is not free after the last process on it has ended."""
    text = taken.kept_back()

    def write() -> None:
        with here.database.write() as session:
            leases.note(session, lease, "memory not free", text)

    if text:
        surely(here, write)


def _say_hung(folder: RunFolder, seconds: float) -> None:
    words = {
        "type": "Hung",
        "message": f"The trainer did nothing for {seconds / 60:.0f} minutes and was ended.",
        "hint": "Its log shows where each thread stood.",
        "field": "",
        "code": int(ExitCode.RETRY),
    }
    write_whole(folder.error, json.dumps(words, indent=2))


def _record(here: Shop, row: RunRow, how: launcher.Outcome) -> None:
    """Write down how a try ended: for good, for now, or to be made once more."""
    lease = leases.lease_of(row)

    def write(session: Session) -> bool:
        # Read in the transaction that writes: a wish to stop that comes meanwhile is not lost.
        now = session.get(RunRow, row.id)
        if now is None or (now.epoch, now.owner) != (lease.epoch, lease.owner):
            return False
        return _settle(session, now, how, is_closing=here.closing.is_set())

    record(here, lease, write)


def _settle(session: Session, row: RunRow, how: launcher.Outcome, *, is_closing: bool) -> bool:
    lease, is_stopping = leases.lease_of(row), row.state == RunState.STOPPING
    is_stop = is_stopping and row.wish != Wish.PAUSE
    reached = RunState((how.result or {}).get("state", RunState.STOPPED))
    # Asked to stop while it was still starting: it cannot take heed yet, and learned nothing.
    is_early = how.is_unexplained and (is_stopping or is_closing)
    if how.error is None and (is_stop or reached is RunState.FINISHED):
        return ended(session, lease, reached, {"result": how.result, "stage": ""})
    if is_early and is_stop:
        return ended(session, lease, RunState.STOPPED, {"stage": ""})
    if how.code == ExitCode.FENCED:
        return _fenced(session, row)
    if how.error is None or is_early:
        return _stopped_for_now(session, row)
    return _crashed(session, row, how)


def _stopped_for_now(session: Session, row: RunRow) -> bool:
    lease = leases.lease_of(row)
    if row.wish == Wish.PAUSE:
        text = f"Paused behind step {row.step}; the machine is free for others."
        return queued_again(session, lease, kind="paused", text=text, is_held=True)
    text = f"The worker was closed; the run goes on from step {row.step} when one is there."
    return queued_again(session, lease, kind="interrupted", text=text)


def _fenced(session: Session, row: RunRow) -> bool:
    """Go on although the trainer believed that another one does; not for ever."""
    attempts = after_loss(leases.attempts_of(row), row.step)
    lease, text = (
        leases.lease_of(row),
        "Its folder was taken over; it goes on from its latest checkpoint.",
    )
    if attempts is None:
        words = {"type": "Fenced", "message": "Two workers write into the folder of this run."}
        return ended(session, lease, RunState.FAILED, {"error": words, "stage": ""})
    return queued_again(session, lease, kind="worker lost", text=text, attempts=attempts)


def _crashed(session: Session, row: RunRow, how: launcher.Outcome) -> bool:
    lease, words = leases.lease_of(row), dict(how.error or {})
    attempts = after_crash(leases.attempts_of(row), row.step) if is_retried(how.code) else None
    if attempts is None or row.state == RunState.STOPPING:
        if row.crashes and is_retried(how.code):
            words["message"] = f"{words['message']} It had been tried again from there before."
        return ended(session, lease, RunState.FAILED, {"error": words, "stage": ""})
    text = f"{words['message']} It is tried once more, from its latest checkpoint."
    return queued_again(session, lease, kind="crashed", text=text, attempts=attempts)
