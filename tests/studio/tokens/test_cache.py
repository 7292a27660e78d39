"""The token cache: the same whoever makes it, whole or not at all, flat in memory, one at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest

from studio.disk import TEMPLATES, Home
from studio.domain.conversation import Conversation, Message, PlainText, Record
from studio.domain.openai_messages import from_openai
from studio.domain.preset import load_models
from studio.domain.reading import Reading
from studio.errors import InputError, NotFoundError
from studio.tokens.cache import TokenCache, build, trim
from studio.tokens.examples import ExampleMaker
from studio.tokens.tiny import ensure_tiny_tokenizer
from studio.tokens.tokenizer import load
from tests.fakes import make_home

ROOT = TEMPLATES.parent
Store = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, verdicts: Path) -> Home:
    """A home folder with a tokenizer whose fast path is known."""
    home = make_home(tmp_path / "home", verdicts)
    known = load_models(TEMPLATES / "models")["tiny/qwen3.5"]
    load(ensure_tiny_tokenizer(known, home.tiny_tokenizer(known.id)), home.verdicts)
    return home


@pytest.fixture
def tokenizer(home: Home) -> Path:
    return home.tiny_tokenizer("tiny/qwen3.5")


def examples() -> list[Conversation]:
    text = (TEMPLATES / "data" / "tidemark-support.jsonl").read_text(encoding="utf-8")
    return [from_openai(json.loads(line)) for line in text.splitlines()]


def store(home: Home, records: Iterable[Record]) -> str:
    content = b"".join(record.to_line() for record in records)
    digest = sha256(content).hexdigest()
    home.dataset(digest).write_bytes(content)
    return digest


def many(num_bytes: int) -> Iterator[Conversation]:
    lines = examples()
    size = sum(len(record.to_line()) for record in lines)
    return islice(cycle(lines), round(len(lines) * num_bytes / size))


def same(one: TokenCache, other: TokenCache) -> bool:
    return len(one) == len(other) and all(
        a.line == b.line
        and a.unwritten == b.unwritten
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.mask, b.mask)
        and np.array_equal(a.turns, b.turns)
        for a, b in zip(one, other, strict=True)
    )


def left_over(home: Home) -> list[str]:
    """Return what lies among the caches and is none."""
    return [p.name for p in home.tokens.iterdir() if p.name.startswith(".") and p.is_dir()]


# ---- content ----------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", ["train", "mask", "strip"])
def test_it_holds_what_the_maker_makes(home: Home, tokenizer: Path, thinking: str) -> None:
    reading = Reading.model_validate({"thinking": thinking})
    cache = build(home, store(home, examples()), tokenizer, reading)
    maker = ExampleMaker(load(tokenizer, home.verdicts), reading)
    made = [e for number, record in enumerate(examples()) for e in maker.make(record, number)]
    assert len(cache) == len(made)
    for cached, example in zip(cache, made, strict=True):
        assert (cached.line, cached.unwritten) == (example.line, example.unwritten)
        assert cached.tokens.dtype == np.uint32
        assert cached.mask.dtype == np.bool_
        for name in ("tokens", "mask", "turns"):
            assert np.array_equal(getattr(cached, name), getattr(example, name))
    assert cache.lengths.tolist() == [len(e.tokens) for e in made]
    assert cache.supervised.tolist() == [int(e.mask[1:].sum()) for e in made]
    assert cache.lines.tolist() == [e.line for e in made]
    counts = cache.meta.counts
    assert counts.num_tokens == cache.lengths.sum()
    assert counts.num_supervised == cache.supervised.sum()
    assert counts.num_conversations == 200
    assert counts.with_thinking == sum(
        any(m.reasoning_content for m in c.messages) for c in examples()
    )


def test_arrays_are_views_of_the_file_and_cannot_be_written(home: Home, tokenizer: Path) -> None:
    example = build(home, store(home, examples()), tokenizer, Reading())[7]
    for array in (example.tokens, example.mask, example.turns):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_any_number_of_processes_makes_the_same(home: Home, tokenizer: Path) -> None:
    digest = store(home, many(1_000_000))
    one = build(home, digest, tokenizer, Reading(), processes=1)
    kept = one.folder.rename(home.tokens / "kept")
    several = build(home, digest, tokenizer, Reading(), processes=3)
    assert [part.file for part in several.meta.parts] == [f"part-0000{n}.arrow" for n in range(3)]
    assert same(TokenCache(kept), several)
    assert TokenCache(kept).meta.counts == several.meta.counts


def test_lines_of_very_different_lengths_are_all_read(home: Home, tokenizer: Path) -> None:
    texts = [PlainText(text="tide " * size) for size in (100_000, 1, 1, 60_000, 1, 80_000, 1, 1)]
    cache = build(home, store(home, list(texts)), tokenizer, Reading(), processes=4)
    assert cache.lines.tolist() == list(range(8))


def test_texts_and_empty_datasets_are_read(home: Home, tokenizer: Path) -> None:
    texts = build(home, store(home, [PlainText(text="High tide.")]), tokenizer, Reading())
    assert texts[0].mask.all()
    assert len(build(home, store(home, []), tokenizer, Reading())) == 0


def test_conversations_that_have_no_example_are_listed(home: Home, tokenizer: Path) -> None:
    ask, answer = Message(role="user", content="a"), Message(role="assistant", content="b")
    late = Message(role="system", content="too late")
    good = Conversation(messages=(ask, answer))
    bad = Conversation(messages=(ask, answer, late, ask, answer))
    mute = Conversation(messages=(ask, Message(role="assistant", content="b", weight=0)))
    records = [good, bad, mute] * 30 + list(examples()) * 60
    cache = build(home, store(home, records), tokenizer, Reading(), processes=3)
    counts = cache.meta.counts
    assert (counts.num_refused, counts.num_unsupervised) == (30, 30)
    assert [item.number for item in counts.refused] == list(range(1, 60, 3))
    assert "System message must be at the beginning" in counts.refused[0].message
    assert counts.unsupervised == tuple(range(2, 62, 3))
    assert set(range(90)) - set(cache.lines.tolist()) == set(range(90)) - set(range(0, 90, 3))


# ---- made once, whole or not at all -----------------------------------------------------------


def test_it_is_found_again_and_policies_have_their_own(home: Home, tokenizer: Path) -> None:
    digest, said = store(home, examples()), list[float]()
    first = build(home, digest, tokenizer, Reading(), progress=said.append)
    assert said[-1] == 1.0
    assert said == sorted(said)
    said.clear()
    assert build(home, digest, tokenizer, Reading(), progress=said.append).folder == first.folder
    assert said == []
    others = [Reading(thinking="mask"), Reading(empty_think="train")]
    folders = {build(home, digest, tokenizer, reading).folder for reading in others}
    assert len(folders | {first.folder}) == 3


def test_another_template_has_its_own(home: Home, tokenizer: Path, tmp_path: Path) -> None:
    digest = store(home, examples())
    changed = shutil.copytree(tokenizer, tmp_path / "changed")
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + "\n{# changed #}")
    folders = [build(home, digest, folder, Reading()).folder for folder in (tokenizer, changed)]
    assert folders[0] != folders[1]


def test_who_asks_at_the_same_time_waits_for_the_first(home: Home, tokenizer: Path) -> None:
    digest = store(home, many(1_000_000))
    said: list[list[float]] = [[], []]
    with ThreadPoolExecutor() as pool:
        found = list(
            pool.map(
                lambda n: build(home, digest, tokenizer, Reading(), progress=said[n].append),
                range(2),
            )
        )
    assert found[0].folder == found[1].folder
    assert sum(bool(one) for one in said) == 1
    assert left_over(home) == []


BUILDER = """
import sys
from pathlib import Path
from studio.disk import Home
from studio.domain.reading import Reading
from studio.tokens.cache import build
home, digest, tokenizer = sys.argv[1:]
build(Home(path=Path(home)), digest, Path(tokenizer), Reading(), processes=2)
"""


def start_builder(home: Home, digest: str, tokenizer: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILDER, str(home.path), digest, str(tokenizer)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def wait_for_children(pid: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        parts = [p for p in listed if b"shard" in Path(f"/proc/{p}/cmdline").read_bytes()]
        if len(parts) == 2:
            return [int(part) for part in parts]
        time.sleep(0.01)
    pytest.fail("no children")


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_builder_leaves_no_process_and_the_next_build_removes_the_rest(
    home: Home, tokenizer: Path
) -> None:
    digest = store(home, many(15_000_000))
    with start_builder(home, digest, tokenizer) as builder:
        children = wait_for_children(builder.pid)
        time.sleep(0.5)
        builder.kill()
    deadline = time.monotonic() + 20
    while any(is_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(child) for child in children)
    assert [path.name for path in home.tokens.glob("*/meta.json")] == []
    assert len(left_over(home)) == 1
    build(home, store(home, examples()), tokenizer, Reading())
    assert left_over(home) == []


def test_a_killed_child_ends_the_build_in_words_and_leaves_nothing(
    home: Home, tokenizer: Path
) -> None:
    digest = store(home, many(15_000_000))
    with start_builder(home, digest, tokenizer) as builder:
        children = wait_for_children(builder.pid)
        time.sleep(0.5)
        os.kill(children[0], signal.SIGKILL)
        assert builder.wait(timeout=60) == 1
        assert builder.stderr is not None
        last = builder.stderr.read().decode().strip().splitlines()[-1]
    assert "MachineError: The system killed the process that reads conversation " in last
    assert not is_alive(children[1])
    assert left_over(home) == []
    assert list(home.tokens.glob("*/meta.json")) == []


def test_what_a_listener_raises_ends_the_build(home: Home, tokenizer: Path) -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(home, store(home, many(500_000)), tokenizer, Reading(), progress=stop)
    assert left_over(home) == []


@pytest.mark.parametrize("name", ["meta.json", "part-00000.arrow"])
def test_a_damaged_cache_is_made_anew(home: Home, tokenizer: Path, name: str) -> None:
    digest = store(home, examples())
    cache = build(home, digest, tokenizer, Reading())
    file = cache.folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert same(build(home, digest, tokenizer, Reading()), TokenCache(cache.folder))


def test_the_longest_unused_are_removed_first(home: Home, tokenizer: Path) -> None:
    digests = [store(home, examples()[:count]) for count in (50, 60, 70)]
    caches = [build(home, digest, tokenizer, Reading()) for digest in digests]
    for age, cache in zip((30, 10, 20), caches, strict=True):
        os.utime(cache.folder / "meta.json", (time.time() - age,) * 2)
    size = sum(f.stat().st_size for c in caches[1:] for f in c.folder.iterdir())
    trim(home, size, keep=caches[2].folder)
    assert [cache.folder.exists() for cache in caches] == [False, True, True]
    trim(home, 0, keep=caches[2].folder)
    assert [cache.folder.exists() for cache in caches] == [False, False, True]
    assert caches[1][3].tokens.sum() > 0, "a cache that is open can be read to its end"


# ---- bad input and hostile templates ----------------------------------------------------------


def test_a_dataset_that_is_gone_is_a_sentence(home: Home, tokenizer: Path) -> None:
    with pytest.raises(NotFoundError, match="The file of the dataset is gone"):
        build(home, "0" * 64, tokenizer, Reading())
    assert left_over(home) == []


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 'a' * 10 ** 10 }}", "needs more than 2 GiB of memory"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: access to attribute"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{% for", "refuses the conversation"),
    ],
)
def test_a_template_that_reads_nothing_is_counted(
    home: Home, tokenizer: Path, tmp_path: Path, template: str, sentence: str
) -> None:
    hostile = shutil.copytree(tokenizer, tmp_path / "hostile")
    (hostile / "chat_template.jinja").write_text(template)
    cache = build(home, store(home, examples()[:3]), hostile, Reading())
    assert len(cache) == 0
    assert cache.meta.counts.num_refused == 3
    assert sentence in cache.meta.counts.refused[0].message


def test_a_template_without_end_names_the_conversation(
    home: Home, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = shutil.copytree(tokenizer, tmp_path / "hostile")
    template = hostile / "chat_template.jinja"
    loops = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    guard = "{% if messages[0].content == 'stop here' %}" + loops + "{% endif %}"
    template.write_text(guard + template.read_text())
    ask, answer = Message(role="user", content="stop here"), Message(role="assistant", content="b")
    records = [*examples()[:4], Conversation(messages=(ask, answer))]
    monkeypatch.setattr("studio.tokens.cache.RECORD_CPU_SECONDS", 2)
    with pytest.raises(InputError, match="does not come to an end: at conversation 5 it took more"):
        build(home, store(home, records), hostile, Reading())
    assert left_over(home) == []


def test_a_folder_without_tokenizer_is_a_sentence(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.json in the folder .* is missing"):
        build(home, store(home, examples()), tmp_path, Reading())


# ---- memory -----------------------------------------------------------------------------------


def test_memory_is_flat_with_the_size_of_the_file(home: Home, tokenizer: Path) -> None:
    peaks = []
    for num_bytes in (2_000_000, 14_000_000):
        digest = store(home, many(num_bytes))
        cache = build(home, digest, tokenizer, Reading(), processes=1)
        peaks.append(cache.meta.peak_memory_bytes)
    assert peaks[1] - peaks[0] < 16 * 2**20
