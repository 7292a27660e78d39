"""Start, watch and stop one process group; tell how it ended.

A trainer is a fresh exec in its own session: nothing of the worker is shared with it, and its
memory is free when it ends. Its environment carries the mark STUDIO_RUN=table:id:epoch:owner, by
which every process of a Lease is found again, whoever its parent is by now.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.disk import RunFolder, write_whole
from studio.domain.outcome import ExitCode
from studio.domain.spec import JobSpec
from studio.errors import InputError, disk_errors
from workers.mortal import PARENT

logger = logging.getLogger(__name__)

TRAINER = "workers.engine"
MARK = "STUDIO_RUN"
UNEXPLAINED = "Unexplained"
STOP_GRACE_SECONDS = 60.0
PROC = Path("/proc")
# All ranks write into the same log: what two of them write at once nobody can read.
DUMP_SECONDS = 0.2
# A log that grows beyond this is cut: what it began with goes, its end stays.
MAX_LOG_BYTES = 64 * 2**20
KEPT_LOG_BYTES = 8 * 2**20


def prepare_run(folder: RunFolder, spec: JobSpec) -> None:
    """Write what a trainer reads into its run folder: the spec, and links to its Datasets.

    Raises:
        InputError: The file of a Dataset is gone.
        MachineError: The disk is full or read-only.
    """
    named = [part.dataset for part in spec.data.mixture]
    named += [spec.data.eval_dataset] if spec.data.eval_dataset else []
    with disk_errors("preparing the run"):
        folder.datasets.mkdir(mode=0o700, parents=True, exist_ok=True)
        for sha256 in (spec.data.dataset, *named):
            dataset = folder.home.dataset(sha256)
            if not dataset.exists():
                raise InputError(
                    "The file of the run's dataset is gone from the home folder.",
                    "Add the dataset again; the same content takes its place.",
                )
            _link(folder.datasets / dataset.name, dataset)
        for old in (folder.result, folder.error, folder.wishes, folder.stage):
            old.unlink(missing_ok=True)
        # The Dataset of runs that name no other, as `python -m workers.engine` takes it too.
        _link(folder.dataset, folder.home.dataset(spec.data.dataset))
    write_whole(folder.spec, json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a process ended.

    Attributes:
        result: Content of its result file; None when it wrote none.
        error: {type, message, hint}; None when it ended well.
    """

    exit_code: int
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def is_unexplained(self) -> bool:
        """Whether the process ended without a word."""
        return self.error is not None and self.error.get("type") == UNEXPLAINED

    @property
    def code(self) -> int:
        """The exit code of the rank that failed; torchrun's own is always 1."""
        return int((self.error or {}).get("code", self.exit_code))


def trainer_command(run_folder: Path, num_gpus: int, module: str = TRAINER) -> list[str]:
    """Return the command of one training run: torchrun with one rank per GPU, one on a CPU.

    Args:
        run_folder: Its folder.
        num_gpus: Ranks; 0 is one rank on the CPU.
        module: What every rank executes.
    """
    return [
        sys.executable,
        "-m",
        "workers.agent",
        "--standalone",
        f"--nproc-per-node={max(1, num_gpus)}",
        "--max-restarts=0",
        f"--shutdown-timeout={STOP_GRACE_SECONDS:.0f}",
        "-m",
        module,
        str(run_folder),
    ]


def module_command(module: str, folder: Path) -> list[str]:
    """Return the command of a merge or a chat process."""
    return [sys.executable, "-m", "workers.tied", module, str(folder)]


def launch(
    command: Sequence[str],
    *,
    mark: str,
    log: Path,
    threads: int = 0,
    more: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, its output appended to a log file.

    Args:
        command: Argument list; never a shell line.
        mark: Value of STUDIO_RUN in its environment.
        log: File for its standard output and error.
        threads: OMP_NUM_THREADS of the process; 0 = half of the cores, at least two.
        more: Further variables of its environment.

    Returns:
        The process.
    """
    environment = child_environment(os.environ, mark=mark, threads=threads)
    environment |= {PARENT: str(os.getpid()), **(more or {})}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )


def child_environment(parent: Mapping[str, str], *, mark: str, threads: int) -> dict[str, str]:
    """Return the environment of a child: the parent's without our own settings, and the mark."""
    environment = {k: v for k, v in parent.items() if not k.startswith("STUDIO_")}
    environment[MARK] = mark
    environment["OMP_NUM_THREADS"] = str(threads or default_threads())
    # How long a thread spins at a barrier before it sleeps. GNU OpenMP's own choice starves every
    # thread as soon as anything else wants a core; sleeping at once wastes a quiet machine.
    # Measured, tiny-qwen3.5, 12 steps on 2 cores, seconds quiet / beside 2 busy processes:
    # default 5.4 / 78, OMP_WAIT_POLICY=PASSIVE 7.9 / 17, 50,000 spins 4.8 / over 111,
    # 10,000 spins 4.7 / 13.
    environment["GOMP_SPINCOUNT"] = "10000"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    # The project is run from its tree as well as installed: the child must find the packages.
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [environment.get("PYTHONPATH")])]
    )
    return environment


def default_threads() -> int:
    """Return the threads of one process: half of the cores, since the page needs some too."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(2, cores // 2))


def ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ask for a stop at the next step boundary; torchrun passes the signal on to its ranks."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process and everything that carries its mark, at once."""
    if process.poll() is None:
        process.kill()
    kill_marked(mark)
    process.wait()


def kill_marked(mark: str) -> list[int]:
    """Kill every process that carries a mark, and wait until they are gone.

    Returns:
        The process numbers that were found.
    """
    found: list[int] = []
    deadline = time.monotonic() + 10
    # Again and again: a process may have had a child between being seen and being killed.
    while (alive := list(marked(mark))) and time.monotonic() < deadline:
        for pid in alive:
            logger.warning("killing process %d, left over from %s", pid, mark)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                logger.info("process %d had ended by itself", pid)
        found.extend(pid for pid in alive if pid not in found)
        time.sleep(0.05)
    return found


def marked(mark: str) -> Iterator[int]:
    """Yield the process numbers that carry a mark, zombies excepted."""
    return (pid for pid, found in all_marks() if found == mark)


def all_marks() -> Iterator[tuple[int, str]]:
    """Yield every process of this user that carries a mark, with the mark, zombies excepted."""
    wanted = f"{MARK}=".encode()
    for entry in PROC.iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
        for variable in environment.split(b"\0"):
            if variable.startswith(wanted):
                yield int(entry.name), variable[len(wanted) :].decode(errors="replace")


def dump_stacks(mark: str) -> None:
    """Ask every process of a mark to write where its threads are into its log, one by one."""
    for pid in list(marked(mark)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)


def head_log(log: Path, title: str) -> None:
    """Write a line between two tries of the same Run: their logs stand one after the other."""
    with disk_errors("writing the log"), log.open("ab+") as file:
        # A try that was killed, or whose disk was full, has left half a line.
        is_half = file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
        file.write((b"\n" if is_half else b"") + f"---- {title} ----\n".encode())


def cut_log(log: Path) -> None:
    """Keep a log from filling the disk; whoever appends to it goes on behind what is left."""
    if not log.exists() or log.stat().st_size <= MAX_LOG_BYTES:
        return
    with log.open("r+b") as file:
        file.seek(-KEPT_LOG_BYTES, os.SEEK_END)
        tail = file.read()
        file.truncate(0)
    with log.open("ab") as file:
        file.write(b"... (the log was too long; what came before is cut off)\n" + tail)


def outcome(exit_code: int, *, result: Path, error: Path) -> Outcome:
    """Tell how a process ended, from the files that it wrote.

    Args:
        exit_code: As of subprocess: negative for a signal; or 128 + signal of the first rank that
            failed.
        result: File that a process writes when it ends well.
        error: File that a process writes when it ends badly.
    """
    written, reached = read_json(error), read_json(result)
    # torchrun reports its own signal when it was asked to stop; the result file tells more. The
    # first rank to fail may have been killed: then the others fail because of it, and say so.
    if reached is None and (written is None or exit_code > 128):
        written = _unexplained(exit_code)
    return Outcome(exit_code=exit_code, result=reached, error=written)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None when there is none, or the disk has damaged it."""
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        logger.error("%s cannot be read: %s", path, error)
        return None


def _unexplained(exit_code: int) -> dict[str, Any]:
    # The negative one is of a process of ours, the other of a rank, as workers.agent tells it.
    if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        message = "The process was killed by the system, most often for want of memory."
        hint = "Choose a smaller micro-batch, a shorter length or a smaller model; see the log."
    elif exit_code == ExitCode.MACHINE:
        message = "The disk is full: the process could not even write down why it ended."
        hint = "Free some space, then resume the run."
    else:
        message = f"The process ended with code {exit_code} and did not say why."
        hint = "See the log below; please report it if it does not explain itself."
    return {"type": UNEXPLAINED, "message": message, "hint": hint}
