"""What the page shows of a Run's life: its history, its buttons, the queue, a fork."""

from html.parser import HTMLParser
from typing import Any

import gradio as gr
import pytest

from studio.domain.fork import Keep
from studio.domain.run import RunState
from studio.domain.spec_diff import Change
from studio.errors import InputError, NotFoundError
from studio.services import checkpoints, forks, queue, runs, waiting
from studio.services.studio import Studio
from studio.services.waiting import Machine, Overview, Waiting
from studio.store.rows import EventRow, RunRow
from studio.ui import (
    checkpoint_list,
    fork_box,
    form,
    queue_tab,
    run_actions,
    runs_tab,
    show,
    show_history,
    show_queue,
    train_tab,
)
from studio.ui.live import changed, plain
from tests.studio.queued import add_checkpoint, add_worker, card, end, start, submit

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


class Tags(HTMLParser):
    """The tags of some HTML, and what is read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        """Note what is read."""
        self.text += data


def event(seq: int, kind: str, text: str = "") -> EventRow:
    return EventRow(job="runs", job_id=1, seq=seq, at=1.0, epoch=1, kind=kind, text=text)


# ---- history ----------------------------------------------------------------------------------


def test_history_is_newest_first_and_marks_what_went_wrong() -> None:
    html = show_history.history(
        [event(1, "queued", "You launched it."), event(2, "crashed", "Bang.")]
    )
    assert html.index("Bang.") < html.index("You launched it.")
    assert html.count('class="fault"') == 1
    assert "It finished." in show_history.history([event(1, "finished")])
    assert "Nothing" in show_history.history([])


def test_a_long_history_says_what_it_leaves_out() -> None:
    assert "5 older events not shown" in show_history.history(
        [event(number, "saved", "s") for number in range(1, 206)]
    )


def test_what_the_studio_went_on_from_is_said_until_somebody_sets_it_going_anew() -> None:
    events = [
        event(1, "queued"),
        event(2, "worker lost", "Its worker on desk was lost."),
        event(3, "began", "Goes on from its Checkpoint of step 40."),
    ]
    banner = Tags(show_history.recovery(events)).text
    assert "Its worker on desk was lost." in banner
    assert "step 40" in banner
    assert show_history.recovery(events[:1]) == ""
    assert show_history.recovery([*events, event(4, "resumed")]) == ""


def test_a_fault_at_the_end_unfolds_the_history_once() -> None:
    events = [event(1, "queued"), event(2, "crashed")]
    assert show_history.ends_with_fault(events)
    assert show_history.last_fault(events) == 2
    after = [*events, event(3, "began")]
    assert not show_history.ends_with_fault(after)
    assert show_history.last_fault(after) == 2
    assert show_history.last_fault([]) == 0


def test_nothing_that_somebody_wrote_becomes_a_tag() -> None:
    change = Change(title=EVIL, key=EVIL, old=EVIL, new=EVIL)
    machine = Machine(
        name=EVIL,
        host=EVIL,
        version=EVIL,
        cards=(card(0).model_copy(update={"name": EVIL, "fault": EVIL}),),
        works=(EVIL,),
        is_closing=True,
    )
    overview = Overview(is_paused=False, waiting=(), machines=(machine,))
    for html in (
        show_history.history([event(1, "crashed", EVIL)]),
        show_history.recovery([event(1, "crashed", EVIL), event(2, "began", EVIL)]),
        show_history.differences([change]),
        show_queue.machines(overview),
    ):
        assert not {"script", "img"} & Tags(html).tags


# ---- buttons ----------------------------------------------------------------------------------


def working(studio: Studio, run_id: int, *, saved: bool = False) -> set[str]:
    """Return the buttons that can be pressed."""
    row = runs.get(studio, run_id)
    buttons = [make() for _, make in run_actions.parts(studio, row, has_checkpoint=saved)]
    return {str(one.value) for one in buttons if one.interactive and one.visible}


def test_only_what_makes_sense_can_be_pressed(studio: Studio) -> None:
    number = submit(studio, data={"eval_share": 0.1})
    assert working(studio, number) == {"Pause", "Stop", "Clone"}
    runs.pause(studio, number)
    assert working(studio, number) == {"Resume", "Stop", "Clone"}
    runs.resume(studio, number)
    start(studio, number)
    assert working(studio, number, saved=True) == {
        "Pause", "Stop", "Save now", "Evaluate now", "Fork", "Clone",
    }  # fmt: skip
    runs.pause(studio, number)
    assert working(studio, number) == {"Stop", "Clone"}
    runs.stop(studio, number)
    assert working(studio, number) == {"Clone"}


def test_what_is_over_is_resumed_merged_or_talked_to(studio: Studio) -> None:
    failed, done = submit(studio), submit(studio)
    end(studio, failed, RunState.FAILED)
    assert working(studio, failed) == {"Resume", "Clone"}
    end(studio, done, RunState.FINISHED)
    studio.home.run(done).adapter.mkdir(parents=True)
    assert working(studio, done, saved=True) == {"Merge", "Chat", "Fork", "Clone"}
    off = [make() for _, make in run_actions.parts(studio, None, has_checkpoint=False)]
    assert not any(button.interactive for button in off)


def test_a_paused_run_is_called_so(studio: Studio) -> None:
    number = submit(studio)
    runs.pause(studio, number)
    row = runs.get(studio, number)
    head = show.run_head(row, runs.progress(studio, row), waiting.why(studio, number))
    assert "PAUSED" in head
    assert "paused by you" in head
    assert "paused" in runs_tab.choices(studio)[0][0]


# ---- what a timer sends -----------------------------------------------------------------------


def is_kept(value: object) -> bool:
    return isinstance(value, dict) and value == gr.skip()


def test_only_what_differs_is_sent() -> None:
    first = changed([plain("a"), plain("b")], {})
    assert first[1:] == ["a", "b"]
    second = changed([plain("a"), plain("c")], first[0])
    assert is_kept(second[1])
    assert second[2] == "c"
    assert all(map(is_kept, changed([plain("a"), plain("c")], second[0])))


def test_a_checkpoint_that_is_gone_gives_way_to_the_newest(studio: Studio) -> None:
    number = submit(studio)
    for step in (4, 8):
        add_checkpoint(studio, number, step, loss=float(step))
    found = checkpoints.listing(studio, number)
    kept = checkpoint_list.parts(number, found, 4)[2][1]()
    assert [step for _, step in kept.choices] == [8, 4]
    assert "★ best" in kept.choices[1][0]
    assert kept.value is None  # as it is in the browser
    assert checkpoint_list.parts(number, found, 2)[2][1]().value == 8
    assert not checkpoint_list.parts(number, [], 2)[2][1]().visible


# ---- queue ------------------------------------------------------------------------------------


def test_a_line_of_the_queue_says_place_reason_and_need() -> None:
    row = RunRow(id=7, name="r", num_gpus=2, priority=5, is_held=False)
    line = show_queue.label(1, Waiting(row=row, why="starts at 22:00"))
    assert line == "1. run 7 · r\nstarts at 22:00 · 2 GPUs · priority 5"


def test_the_head_of_the_queue_counts_and_warns(studio: Studio) -> None:
    assert "No run waits" in show_queue.head(waiting.overview(studio))
    assert "No worker is alive" in show_queue.machines(waiting.overview(studio))
    one, _ = submit(studio), submit(studio)
    queue.hold(studio, one)
    assert "2 runs in the queue, 1 of them paused." in show_queue.head(waiting.overview(studio))
    queue.pause(studio, True)
    assert "no run is started" in show_queue.head(waiting.overview(studio))


def test_workers_show_their_cards(studio: Studio) -> None:
    add_worker(studio, "w", card(0))
    add_worker(studio, "v")
    shown = Tags(show_queue.machines(waiting.overview(studio))).text
    assert "GPU 0: card, 80 of 80 GiB free, free" in shown
    assert "CPU: one run at a time" in shown


def test_when_a_run_starts_is_stored_whole_or_not_at_all(studio: Studio) -> None:
    one, two = submit(studio), submit(studio)
    use = queue_tab.use_when
    for wrong in (("x", "", ""), ("1", "soon", ""), ("1", "", "none")):
        with pytest.raises(InputError):
            use(studio, two, *wrong)
    assert runs.get(studio, two).priority == 0
    use(studio, two, "3", "+8h", f"run {one}")
    row = runs.get(studio, two)
    assert (row.priority, row.after_run_id) == (3, one)
    assert row.start_after is not None
    filled = queue_tab.when_of(studio, two)
    use(studio, two, *filled)
    assert runs.get(studio, two).start_after == row.start_after
    use(studio, two, "", "", "")
    row = runs.get(studio, two)
    assert (row.priority, row.start_after, row.after_run_id) == (0, None, None)
    assert queue_tab.when_of(studio, None) == ["", "", ""]
    with pytest.raises(NotFoundError):
        use(studio, None, "", "", "")


# ---- forks ------------------------------------------------------------------------------------


@pytest.fixture
def parent(studio: Studio) -> int:
    number = submit(studio)
    end(studio, number, RunState.FINISHED)
    add_checkpoint(studio, number, 4)
    return number


def test_the_box_says_what_goes_on_and_what_is_different(studio: Studio, parent: int) -> None:
    origin = {"run": parent, "step": 4, "keep": "weights"}
    leaves = form.leaves()
    mode, *values = train_tab.opened(studio, origin)
    assert mode == "Advanced"
    state, frame, words = values[-3:]
    assert (state, frame.visible) == (origin, True)
    assert f"Fork of run {parent} from step 4" in words
    assert "only the weights go on" in words
    assert "Nothing is different yet." in words
    typed = form.to_values(runs.spec_of(runs.get(studio, parent)), leaves)
    keys = [leaf.key for leaf in leaves]
    typed[keys.index("optim.learning_rate")] = "7e-4"
    assert "0.0007" in fork_box.words_of(studio, leaves, typed, origin)
    typed[keys.index("lora.rank")] = "3"
    assert "cannot change what" in fork_box.words_of(studio, leaves, typed, origin)
    assert "cannot change what" not in fork_box.words_of(studio, leaves, typed, {"run": parent})
    typed[keys.index("lora.rank")] = "many"
    assert is_kept(fork_box.words_of(studio, leaves, typed, origin))
    assert is_kept(fork_box.words_of(studio, leaves, typed, None))


def test_a_launch_from_the_box_forks_or_clones(studio: Studio, parent: int) -> None:
    spec: Any = fork_box.spec_of(studio, {"run": parent})
    forked = fork_box.launch(studio, {"run": parent, "step": 4, "keep": "everything"}, spec)
    assert runs.get(studio, forked).parent_step == 4
    for origin in (None, {"run": parent}):
        assert runs.get(studio, fork_box.launch(studio, origin, spec)).parent_id is None
    with pytest.raises(NotFoundError, match="no checkpoint of step 5"):
        fork_box.spec_of(studio, {"run": parent, "step": 5, "keep": "weights"})


def test_lineage_is_told_on_both_sides(studio: Studio, parent: int) -> None:
    spec = forks.changed_spec(studio, parent, {})
    child = forks.fork(studio, parent, 4, spec, keep=Keep.WEIGHTS).id
    add_checkpoint(studio, child, 2)
    grandchild = forks.fork(studio, child, 2, spec).id

    def told(number: int) -> str:
        found = forks.lineage_of(studio, number)
        return Tags(show_history.lineage(runs.get(studio, number), found)).text

    assert told(parent) == f"Forked from it: run {child} (step 4)."
    assert told(grandchild).startswith(f"Forked from run {child} at step 2: weights, optimizer")
    assert told(grandchild).endswith(f"That came from run {parent}.")
    assert told(submit(studio)) == ""
