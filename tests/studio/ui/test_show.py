"""Values as HTML: what people and models wrote is text, and figures change units in time."""

import time
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.certificate import Certificate, PromptCheck
from studio.domain.conversation import (
    Conversation,
    Image,
    Message,
    PlainText,
    Preference,
    ToolCall,
)
from studio.domain.preset import Needs, Preset
from studio.domain.proof import Answer, Proof, Recall
from studio.domain.reading import Truncation
from studio.domain.run import RunState
from studio.domain.validation import Issue, Report
from studio.services.runs import Progress
from studio.store.rows import DatasetRow, RunRow
from studio.tokens.sandbox import Inspection, Piece, Shown
from studio.ui import show, show_record, show_report, show_tokens

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """What a browser makes of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and what it carries."""
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """See that tags are closed in order."""
        if tag != "br":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note what is read."""
        self.text += data


def progress(**changes: object) -> Progress:
    values = {"step": 3, "total_steps": 9, "left_seconds": None, "elapsed_seconds": None}
    return Progress(**{**values, **changes})  # type: ignore[arg-type]


def run(state: RunState = RunState.RUNNING, **changes: object) -> RunRow:
    values = {"id": 7, "name": "run", "stage": "", "step": 3, "total_steps": 9, "error": None}
    return RunRow(state=state, **{**values, **changes})


def dataset(name: str = "d", source_name: str = "d.jsonl") -> DatasetRow:
    return DatasetRow(
        name=name,
        source_name=source_name,
        sha256="0" * 64,
        size_bytes=2048,
        created_at=1.0,
        num_conversations=3,
        kind="conversations",
        source={"type": "upload", "name": source_name, "revision": source_name},
        report={},
    )


def proof(passed: bool | None = True, text: str = "fine") -> Proof:
    return Proof(name=text, passed=passed, summary=text)


def recall(right: int, all_: int, text: str = "") -> Recall:
    answers = [
        Answer(
            question=f"q{text}",
            fact="42",
            base=f"no{text}",
            tuned=f"42{text}" if number < right else f"43{text}",
        )
        for number in range(all_)
    ]
    return Recall(answers=tuple(answers))


def certificate(text: str = "", *, passed: bool = True) -> Certificate:
    prompt = PromptCheck(
        prompt=f"p{text}",
        num_tokens=4,
        mean_kl=0.0 if passed else 1.0,
        effect_kl=0.5,
        max_logit_difference=0.01,
        logit_spread=1.0,
        top1_agreement=1.0,
    )
    tensors = (f"a{text}", "b")
    return Certificate(
        base_model="m",
        adapter_sha256="0",
        dtype=f"bfloat16{text}",
        targeted_tensors=tensors,
        changed_tensors=tensors if passed else (*tensors, f"c{text}"),
        delta_kept=dict.fromkeys(tensors, 1.0),
        num_tensors=9,
        files={f"file{text}": "0" * 64},
        prompts=(prompt,),
    )


def preset(text: str = "", **needs: Any) -> Preset:
    return Preset(
        title=f"t{text}",
        summary=f"s{text}",
        needs=Needs.model_validate({"gpus": 1, **needs}),
        source=f"https://example.org/{text}",
        spec={},
    )


ISSUE = Issue(line=3, path=EVIL, value=EVIL, reason=EVIL)
REPORT = Report(format=EVIL, num_errors=1, num_lines=1, issues=(ISSUE,))
CALL = ToolCall(name=EVIL, arguments={EVIL: EVIL})
TALK = Conversation(
    messages=(
        Message(role="system", content=EVIL),
        Message(role="user", content=EVIL, images=(Image(at=0, ref=EVIL),)),
        Message(role="assistant", content=EVIL, reasoning_content=EVIL, tool_calls=(CALL,)),
        Message(role="tool", content=EVIL),
        Message(role="assistant", content=EVIL, weight=0),
    )
)
PAIR = Preference(messages=(), chosen=TALK.messages, rejected=TALK.messages)
PIECE = Piece(kind="user", supervised=True, kept=True, tokens=(1, 2), texts=(EVIL, ""))
SEEN = Inspection(
    examples=(
        Shown(
            pieces=(PIECE,),
            tokens=2,
            supervised=1,
            trained=1,
            lost_tokens=0,
            lost_supervised=0,
            unwritten=1,
            num_not_shown=0,
        ),
    ),
    is_fast=True,
    why_slow="",
)
WORDS = {"type": EVIL, "message": EVIL, "hint": EVIL}

SHOWN = {
    "empty": show.empty(EVIL, EVIL),
    "notice": show.notice("good", EVIL, EVIL),
    "facts": show.facts([(EVIL, EVIL)]),
    "report": show_report.report(dataset(EVIL, EVIL), REPORT),
    "issues": show_report.issues(REPORT),
    "rejected": show_report.rejected(EVIL, REPORT, [EVIL]),
    "welcome": show_report.welcome(dataset(EVIL), is_new=False),
    "record": show_record.record(TALK),
    "preference": show_record.record(PAIR),
    "text": show_record.record(PlainText(text=EVIL)),
    "tokens": show_tokens.inspection(SEEN, Truncation()),
    "preset": show.preset(preset(EVIL, gpu_memory_gib=80, memory_basis=EVIL)),
    "chip": show.chip(EVIL),
    "run_head": show.run_head(run(RunState.FAILED, name=EVIL, error=WORDS), progress()),
    "run_head stage": show.run_head(run(stage=EVIL), progress()),
    "proofs": show.proofs(
        [proof(text=EVIL), proof(None, EVIL), proof(False, EVIL)], None, is_over=False
    ),
    "certificate": show.certificate(certificate(EVIL)),
    "certificate failed": show.certificate(certificate(EVIL, passed=False)),
    "recall": show.recall(recall(1, 2, EVIL)),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_people_and_models_wrote_is_text_and_nothing_else(name: str) -> None:
    page = Page(SHOWN[name])
    assert not page.tags & {"script", "img"}
    assert not {attribute for attribute in page.attributes if attribute.startswith("on")}
    assert page.open == []
    assert EVIL in page.text


@pytest.mark.parametrize("name", SHOWN)
def test_links_lead_where_the_preset_says(name: str) -> None:
    expected = [f"https://example.org/{EVIL}"] if name == "preset" else []
    assert Page(SHOWN[name]).links == expected


# ---- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (60, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (86_400, "24 h 0 min"),
    ],
)
def test_durations_never_show_sixty_of_anything(seconds: float, words: str) -> None:
    assert show.duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**30, "1.0 GiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_take_the_largest_unit_that_leaves_one(num_bytes: int, words: str) -> None:
    assert show.size(num_bytes) == words


@given(st.integers(min_value=0, max_value=2**50 - 1))
def test_a_size_is_close_to_what_it_says(num_bytes: int) -> None:
    number, unit = show.size(num_bytes).split()
    factor = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    assert abs(float(number) * factor - num_bytes) <= 0.051 * factor
    assert num_bytes == 0 or 1 <= float(number) <= 1024


def test_counts_are_grouped() -> None:
    assert [show.count(number) for number in (0, 999, 1000, 1_234_567)] == [
        "0",
        "999",
        "1,000",
        "1,234,567",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-100, "just now"), (0, "just now"), (90, "1 min ago"), (7260, "2 h 1 min ago")],
)
def test_moments_are_told_from_now(seconds: float, words: str) -> None:
    # One more second keeps the answer the same on a machine that pauses meanwhile.
    assert show.ago(time.time() - seconds - 1) == words


def test_a_moment_of_another_day_is_a_date() -> None:
    assert show.ago(0) in ("01 Jan 1970", "31 Dec 1969")


# ---- what is said -----------------------------------------------------------------------------


def test_no_findings_are_no_table() -> None:
    assert show_report.issues(Report()) == ""


def test_findings_beyond_the_shown_ones_are_counted() -> None:
    many = tuple(Issue(line=n, reason="r") for n in range(1, show_report.MAX_SHOWN_ISSUES + 1))
    found = Report(counts={"json": 50, "duplicate": 5}, issues=many)
    assert f"and {55 - show_report.MAX_SHOWN_ISSUES} more findings" in show_report.issues(found)


def test_a_finding_about_the_whole_file_has_no_line() -> None:
    assert "<td>file</td>" in show_report.issues(Report(issues=(Issue(line=0, reason="empty"),)))


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"gpus": 0}, "runs on this machine's CPU"),
        ({"gpus": 1}, "needs 1 GPU ·"),
        ({"gpus": 2, "gpu_memory_gib": 80}, "needs 2 GPUs of 80 GiB ·"),
        ({"gpus": 1, "gpu_memory_gib": 24, "memory_basis": "computed"}, "24 GiB (computed) ·"),
    ],
)
def test_a_preset_says_what_it_needs(needs: dict[str, Any], words: str) -> None:
    assert words in Page(show.preset(preset(**needs))).text


def test_a_running_run_shows_how_long_it_takes() -> None:
    page = Page(show.run_head(run(), progress(elapsed_seconds=61.0, left_seconds=(120.0, 180.0))))
    assert "1 min 1 s so far · 2 min 0 s to 3 min 0 s left" in page.text
    assert "step 3 of 9" in page.text


def test_a_finished_run_is_full_and_says_how_long_it_took() -> None:
    html = show.run_head(run(RunState.FINISHED), progress(elapsed_seconds=61.0))
    assert 'aria-valuenow="100"' in html
    assert "took 1 min 1 s" in html


@pytest.mark.parametrize("state", RunState)
def test_every_state_has_words(state: RunState) -> None:
    row = run(state, total_steps=None)
    page = Page(show.run_head(row, progress(total_steps=None)))
    assert "no step yet · " in page.text
    assert not page.text.endswith("· ")


def test_a_failure_without_words_is_still_said() -> None:
    assert "It failed." in show.run_head(run(RunState.FAILED), progress())


def test_before_the_first_proof_the_page_says_that_they_come() -> None:
    assert "Proofs appear here" in show.proofs([], None, is_over=False)
    assert "ended before" in show.proofs([], None, is_over=True)


@pytest.mark.parametrize(("right", "kind"), [(0, "bad"), (7, "bad"), (8, "good"), (10, "good")])
def test_recall_is_good_from_eight_of_ten(right: int, kind: str) -> None:
    assert f'class="stamp {kind}"' in show.proofs([], recall(right, 10), is_over=False)
    assert f'class="notice {kind}"' in show.recall(recall(right, 10))


@pytest.mark.parametrize(
    ("passed", "kind", "word"),
    [(True, "good", "passed"), (False, "bad", "failed"), (None, "info", "noted")],
)
def test_a_stamp_says_how_a_proof_came_out(passed: bool | None, kind: str, word: str) -> None:
    html = show.proofs([proof(passed, "mask")], None, is_over=False)
    assert f'class="stamp {kind}"' in html
    assert f"mask · {word}" in html


@pytest.mark.parametrize("passed", [True, False])
def test_a_certificate_says_its_verdict_and_its_reasons(passed: bool) -> None:
    found = certificate(passed=passed)
    page = Page(show.certificate(found))
    assert ("PASSED" in page.text, "FAILED" in page.text) == (passed, not passed)
    assert all(reason in page.text for reason in found.failures)
