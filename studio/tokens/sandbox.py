"""The inspector's side of the process that renders foreign chat templates.

The process is started at the first request and kept, since loading a tokenizer takes longer than
reading a conversation. A template that does not end, or wants all memory, ends that process only;
the next request starts another. It lives by its standard input, so it ends with the page.
"""

import json
import selectors
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from studio.domain.conversation import RECORD_TYPES, Record
from studio.domain.reading import Reading, Truncation
from studio.errors import EngineError, InputError, MachineError
from studio.tokens.children import death, error_from
from studio.tokens.inspect import Inspection, Piece, Request, Shown
from studio.tokens.limits import MEMORY_BYTES, start_child

__all__ = ["Inspection", "Inspector", "Piece", "Shown"]

CPU_SECONDS = 10
# Twice what a quiet machine takes to load a tokenizer of 250,000 tokens and test its fast path.
WALL_SECONDS = 90.0
_KINDS = {kind_type: kind for kind, kind_type in RECORD_TYPES.items()}


class Inspector:
    """Shows records as the trainer reads them; one at a time, from any thread.

    Args:
        verdicts: Folder that keeps which tokenizers have a fast path, as `Home.verdicts`.
        cpu_seconds: Processor time that the template may take for one record.
        wall_seconds: Time that one request may take in all.
    """

    def __init__(
        self,
        verdicts: Path,
        *,
        cpu_seconds: int = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
    ) -> None:
        self._verdicts = verdicts
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None

    def inspect(
        self, record: Record, tokenizer: Path, reading: Reading, truncation: Truncation
    ) -> Inspection:
        """Return a record as the trainer reads it.

        Args:
            record: A Conversation or a text.
            tokenizer: Folder with tokenizer.json and the chat template.
            reading: What is learned of the thinking.
            truncation: What happens to long examples.

        Raises:
            InputError: The tokenizer or its template is wrong, refuses the record, does not come
                to an end, or needs too much memory.
            EngineError: The process ended for no reason that is known.
        """
        self._verdicts.mkdir(parents=True, exist_ok=True)
        request = Request(
            record=record.to_json(),
            kind=_KINDS[type(record)],
            tokenizer=tokenizer.resolve(),
            verdicts=self._verdicts.resolve(),
            reading=reading,
            truncation=truncation,
            cpu_seconds=self._cpu_seconds,
        )
        line = request.model_dump_json().encode() + b"\n"
        with self._turn:
            answer = json.loads(self._ask(line))
            if answer.get("ends"):
                self._end()
        if "error" in answer:
            raise error_from(answer["error"])
        return Inspection.model_validate(answer["done"])

    def close(self) -> None:
        """End the process; a further request starts another."""
        with self._turn:
            self._end()

    def _ask(self, line: bytes) -> bytes:
        is_new = self._process is None
        try:
            return self._answer(self._started(), line)
        except (EngineError, MachineError):
            # It died for no reason of its own: before this request, and then a new one can answer.
            self._end()
            if is_new:
                raise
        except BaseException:
            self._end()
            raise
        return self._ask(line)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._words = tempfile.TemporaryFile()
            self._process = start_child("inspect", last_words=self._words)
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death(process) from error
        deadline, heard = time.monotonic() + self._wall_seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not heard.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise InputError(
                        "The model's chat template did not finish this conversation within "
                        f"{self._wall_seconds:.0f} s.",
                        "Use the template that was published with the model.",
                    )
                chunk = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
                if not chunk:
                    raise self._death(process)
                heard += chunk
        return heard

    def _death(self, process: subprocess.Popen[bytes]) -> Exception:
        assert self._words is not None
        self._words.seek(0)
        words = self._words.read().decode("utf-8", errors="replace").strip()
        exit_code = process.wait()
        return death(exit_code, "this conversation", self._cpu_seconds, MEMORY_BYTES, words)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._words is not None:
            self._words.close()
            self._words = None
