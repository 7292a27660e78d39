"""The inspector: what the trainer reads, and templates that somebody hostile wrote."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation, Message, PlainText, Preference
from studio.domain.preset import load_models
from studio.domain.reading import Reading, Truncation
from studio.errors import InputError
from studio.tokens.examples import ExampleMaker
from studio.tokens.sandbox import Inspection, Inspector
from studio.tokens.tiny import ensure_tiny_tokenizer
from studio.tokens.tokenizer import load
from studio.tokens.truncate import truncate

TALK = Conversation(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="Is \U0001f30a high?"),
        Message(role="assistant", reasoning_content="Let me see.", content="At noon, \u6f6e."),
        Message(role="user", content="Thanks! " * 12),
        Message(role="assistant", content="You are welcome."),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Path:
    """A tokenizer whose fast path is known: the test of it would take the time that a text has."""
    known = load_models(TEMPLATES / "models")["tiny/qwen3.5"]
    folder = ensure_tiny_tokenizer(known, tmp_path_factory.mktemp("models") / "t")
    load(folder, verdicts)
    return folder


@pytest.fixture(scope="module")
def inspector(verdicts: Path) -> Iterator[Inspector]:
    made = Inspector(verdicts, cpu_seconds=2)
    yield made
    made.close()


def look(inspector: Inspector, folder: Path, *, cutoff: int | None = None) -> Inspection:
    return inspector.inspect(
        TALK, folder, Reading(), Truncation(max_length_tokens=cutoff, policy="cut")
    )


def hostile(folder: Path, tmp_path: Path, template: str) -> Path:
    shutil.copytree(folder, tmp_path / "hostile")
    (tmp_path / "hostile" / "chat_template.jinja").write_text(template)
    return tmp_path / "hostile"


def test_it_shows_what_the_trainer_reads(
    inspector: Inspector, folder: Path, verdicts: Path
) -> None:
    maker = ExampleMaker(load(folder, verdicts), Reading())
    examples, renderings = maker.make(TALK, 0), maker.renderings(TALK)
    rule = Truncation(max_length_tokens=60, policy="cut")
    inspection = look(inspector, folder, cutoff=60)
    assert inspection.is_fast
    for shown, example, rendering in zip(inspection.examples, examples, renderings, strict=True):
        pieces = shown.pieces
        assert "".join("".join(piece.texts) for piece in pieces) == rendering.text
        assert [t for piece in pieces for t in piece.tokens] == example.tokens.tolist()
        flags = [piece.supervised for piece in pieces for _ in piece.tokens]
        assert flags == example.mask.tolist()
        kept = [piece.kept for piece in pieces for _ in piece.tokens]
        cut = truncate(example, rule)
        assert kept == cut.kept.tolist()
        assert (shown.trained, shown.lost_tokens) == (len(cut.examples), cut.lost_tokens)
        assert shown.supervised == int(example.mask[1:].sum())
    kinds = {piece.kind for shown in inspection.examples for piece in shown.pieces}
    assert kinds == {"header", "system", "user", "think", "answer"}


def test_a_text_is_shown_with_the_token_that_ends_it(inspector: Inspector, folder: Path) -> None:
    text = PlainText(text="High \U0001f30a water")
    shown = inspector.inspect(text, folder, Reading(), Truncation()).examples[0]
    assert [piece.kind for piece in shown.pieces] == ["text"]
    assert "".join(shown.pieces[0].texts) == text.text
    assert shown.pieces[0].texts[-1] == ""
    assert shown.tokens == len(shown.pieces[0].tokens)


def test_very_long_examples_are_shown_in_part(inspector: Inspector, folder: Path) -> None:
    words = " tide" * 30_000
    talk = Conversation(
        messages=(Message(role="user", content=words), Message(role="assistant", content="Yes."))
    )
    shown = inspector.inspect(talk, folder, Reading(), Truncation()).examples[0]
    assert sum(len(piece.tokens) for piece in shown.pieces) == 20_000
    assert shown.num_not_shown == shown.tokens - 20_000


def test_what_cannot_be_read_is_a_sentence(
    inspector: Inspector, folder: Path, tmp_path: Path
) -> None:
    answer = (Message(role="assistant", content="Yes."),)
    pair = Preference(messages=TALK.messages[:2], chosen=answer, rejected=answer)
    with pytest.raises(InputError, match="A preference holds a better and a worse reply"):
        inspector.inspect(pair, folder, Reading(), Truncation())
    with pytest.raises(InputError, match=r"tokenizer.json in the folder nowhere is missing"):
        inspector.inspect(TALK, tmp_path / "nowhere", Reading(), Truncation())


# ---- hostile templates ------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 4 + "{% set x = i * i %}" + "{% endfor %}" * 4


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 'a' * 10 ** 10 }}", "needs more than 2 GiB of memory|does not come to an end"),
        (
            "{% set x = namespace(s='a' * 2 ** 20) %}"
            + LOOP
            + "{% set x.s = x.s + x.s %}{% endfor %}",
            "needs more than 2 GiB of memory|does not come to an end",
        ),
        ("{{ range(10 ** 9) | list }}", "refuses the conversation: Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation: access to"),
        (
            "{{ cycler.__init__.__globals__.os.system('id') }}",
            "refuses the conversation: access to",
        ),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% include '/etc/passwd' %}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the conversation"),
        ("{{ 9 ** (9 ** 9) }}", "refuses|did not finish|does not come to an end"),
        ("{% for", "refuses the conversation"),
        (
            "{{ messages | tojson(indent=10 ** 9) }}",
            "needs more than 2 GiB of memory|does not come to an end",
        ),
    ],
    ids=str,
)
def test_a_hostile_template_is_a_sentence_and_the_next_request_works(
    template: str, sentence: str, inspector: Inspector, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        look(inspector, hostile(folder, tmp_path, template))
    assert look(inspector, folder).examples


def test_a_template_without_end_is_ended(
    inspector: Inspector, folder: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"does not come to an end: .* 2 s of processor time"):
        look(inspector, hostile(folder, tmp_path, ENDLESS))
    assert time.monotonic() - start < 60
    assert look(inspector, folder).examples


def test_no_request_waits_longer_than_it_may(verdicts: Path, folder: Path, tmp_path: Path) -> None:
    patient = Inspector(verdicts, wall_seconds=2.0)
    with pytest.raises(InputError, match="did not finish this conversation within 2 s"):
        look(patient, hostile(folder, tmp_path, ENDLESS))
    patient.close()


def test_a_process_that_was_killed_is_replaced(inspector: Inspector, folder: Path) -> None:
    first = look(inspector, folder)
    pid = child_of(os.getpid())
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid):
        time.sleep(0.01)
    assert look(inspector, folder) == first
    assert child_of(os.getpid()) != pid


def test_several_threads_take_turns(inspector: Inspector, folder: Path) -> None:
    found: list[Inspection] = []
    threads = [
        threading.Thread(target=lambda: found.append(look(inspector, folder))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(inspection == found[0] for inspection in found)


def test_the_process_sees_nothing_of_the_environment(
    inspector: Inspector, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_SECRET", "tide")
    inspector.close()
    look(inspector, folder)
    environment = Path(f"/proc/{child_of(os.getpid())}/environ").read_bytes()
    assert b"STUDIO_SECRET" not in environment
    assert os.getsid(child_of(os.getpid())) == child_of(os.getpid())


PAGE = """
import sys, time
from pathlib import Path
from studio.domain.conversation import PlainText
from studio.domain.reading import Reading, Truncation
from studio.tokens.sandbox import Inspector
verdicts, folder = map(Path, sys.argv[1:])
inspector = Inspector(verdicts)
inspector.inspect(PlainText(text="tide"), folder, Reading(), Truncation())
print("ready", flush=True)
time.sleep(600)
"""


def test_the_process_ends_with_the_page(folder: Path, verdicts: Path) -> None:
    command = [sys.executable, "-c", PAGE, str(verdicts), str(folder)]
    with subprocess.Popen(command, cwd=TEMPLATES.parent, stdout=subprocess.PIPE) as page:
        assert page.stdout is not None
        assert page.stdout.readline() == b"ready\n"
        child = child_of(page.pid)
        assert is_alive(child)
        page.kill()
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
