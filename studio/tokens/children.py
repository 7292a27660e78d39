"""Run the processes of one cache, follow what they say, and end them all when one fails."""

import json
import selectors
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from studio import errors
from studio.errors import EngineError, InputError, MachineError, StudioError
from studio.tokens.limits import memory_words, start_child
from studio.tokens.shard import ShardOrder, ShardReport, position_name

_ORDER = "order.json"
_LAST_WORDS_BYTES = 2000


@dataclass(kw_only=True, slots=True)
class _Child:
    """One process.

    Attributes:
        heard: What it said and is no whole line yet.
    """

    index: int
    process: subprocess.Popen[bytes]
    words: IO[bytes]
    done_bytes: int = 0
    heard: bytes = b""
    report: ShardReport | None = None
    error: dict[str, str] = field(default_factory=dict)


def make_shards(
    order: ShardOrder, folder: Path, progress: Callable[[float], None]
) -> list[ShardReport]:
    """Make every shard of an order, each in a process of its own.

    Args:
        order: What to read.
        folder: Where the shards are written.
        progress: Called with the share of bytes that were read, 0 to 1.

    Returns:
        How each shard went, in order.

    Raises:
        InputError: The tokenizer or its template is wrong, or does not come to an end.
        MachineError: The disk or the memory is full.
        EngineError: A process ended otherwise.
    """
    (folder / _ORDER).write_text(order.model_dump_json(), encoding="utf-8")
    total = max(1, sum(end - start for start, end in order.ranges))
    with _started(order, folder) as children, selectors.DefaultSelector() as selector:
        for child in children:
            assert child.process.stdout is not None
            selector.register(child.process.stdout, selectors.EVENT_READ, child)
        while selector.get_map():
            for key, _ in selector.select():
                if not _hear(key.data):
                    selector.unregister(key.fileobj)
                    _check_end(key.data, order, folder)
            progress(min(1.0, sum(child.done_bytes for child in children) / total))
        reports = [child.report for child in children if child.report is not None]
    (folder / _ORDER).unlink()
    return reports


@contextmanager
def _started(order: ShardOrder, folder: Path) -> Iterator[list[_Child]]:
    with ExitStack() as stack:
        children = []
        for index in range(len(order.ranges)):
            words = stack.enter_context((folder / f"{index}.log").open("w+b"))
            process = start_child("shard", str(folder / _ORDER), str(index), last_words=words)
            children.append(_Child(index=index, process=process, words=words))
            stack.callback(_end, process)
        yield children
        for child in children:
            (folder / f"{child.index}.log").unlink()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _hear(child: _Child) -> bool:
    """Read what a child said; return whether it may say more."""
    assert child.process.stdout is not None
    chunk = child.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
    *lines, child.heard = (child.heard + chunk).split(b"\n")
    for line in lines:
        said = json.loads(line)
        child.done_bytes = said.get("bytes", child.done_bytes)
        child.error = said.get("error", child.error)
        if "done" in said:
            child.report = ShardReport.model_validate(said["done"])
    return bool(chunk)


def _check_end(child: _Child, order: ShardOrder, folder: Path) -> None:
    """Raise why a child ended, unless it has done its work."""
    exit_code = child.process.wait()
    if child.error:
        raise error_from(child.error)
    if child.report is None:
        where = f"conversation {_reached(child.index, order, folder)}"
        child.words.seek(max(0, child.words.seek(0, 2) - _LAST_WORDS_BYTES))
        words = child.words.read().decode("utf-8", errors="replace").strip()
        raise death(exit_code, where, order.cpu_seconds, order.memory_bytes, words)


def error_values(error: StudioError) -> dict[str, str]:
    """Return an error as the process that started this one reads it."""
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "field": error.field,
    }


def error_from(values: dict[str, str]) -> StudioError:
    """Return the error that a child has described."""
    kinds: dict[str, type[StudioError]] = {
        kind.__name__: kind
        for kind in (InputError, errors.NotFoundError, MachineError, EngineError)
    }
    kind = kinds.get(values["type"], EngineError)
    return kind(values["message"], values["hint"], values.get("field", ""))


def death(
    exit_code: int, where: str, cpu_seconds: int, memory_bytes: int, words: str
) -> StudioError:
    """Return why a child ended without a word of its own.

    Args:
        exit_code: As of subprocess: negative for a signal.
        where: What it was reading.
        cpu_seconds: Processor time that it had for that.
        memory_bytes: Address space that it had.
        words: The end of its standard error.
    """
    if exit_code == -signal.SIGXCPU:
        return InputError(
            f"The model's chat template does not come to an end: at {where} it took more than "
            f"{cpu_seconds} s of processor time.",
            "Use the template that was published with the model.",
        )
    if exit_code == -signal.SIGKILL:
        return MachineError(
            f"The system killed the process that reads {where}, most often for want of memory.",
            "Close other programs, or use a machine with more memory.",
        )
    if exit_code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS) or "MemoryError" in words:
        message, hint = memory_words(memory_bytes)
        return InputError(f"{message} It was reading {where}.", hint)
    last = words.splitlines()[-1] if words else "it said nothing"
    return EngineError(
        f"The process that reads {where} ended with code {exit_code}: {last}",
        "This is a fault of the studio; please report it.",
    )


def _reached(index: int, order: ShardOrder, folder: Path) -> int:
    """Return the number, from 1, of the conversation that a shard was reading."""
    position = folder / position_name(index)
    at = position.read_bytes() if position.exists() else b""
    number = struct.unpack("<Q", at)[0] if at else 0
    before, left = 0, order.ranges[index][0]
    with order.dataset.open("rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            before += chunk.count(b"\n")
            left -= len(chunk)
    return before + number + 1
