"""Verbs of Runs and Merges."""

from typing import cast

import pytest

from studio.dispatch import Bell
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services import artifacts, chats, datasets, run_files, runs
from studio.services.studio import Studio
from studio.store import leases
from studio.store.clock import holder
from studio.store.rows import ChatRow
from tests.fakes import FakeDispatch
from tests.studio.queued import start


def spec(studio: Studio, **changes: object) -> JobSpec:
    name = datasets.import_example(studio).name
    return runs.spec_from_preset(studio, "tiny-qwen3.5", {"data": {"dataset": name}, **changes})


def test_a_run_is_committed_before_the_bell_rings(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    dispatch = cast(FakeDispatch, studio.dispatch)
    assert dispatch.rung == [Bell.TRAIN]
    assert dispatch.waiting_when_rung == [1]
    assert row.state == RunState.QUEUED


def test_the_stored_spec_names_the_dataset_by_content(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    assert row.spec["data"]["dataset"] == row.dataset.sha256
    assert runs.spec_of(row).model.id == "tiny/qwen3.5"


def test_a_target_that_matches_nothing_is_refused_and_nothing_is_queued(studio: Studio) -> None:
    wrong = spec(studio, lora={"targets": ["attention", "shared_expert"]})
    with pytest.raises(InputError, match=r"shared_expert matches nothing.*dense_mlp"):
        runs.submit(studio, wrong)
    assert runs.listing(studio) == []


def test_an_unknown_preset_lists_what_there_is(studio: Studio) -> None:
    with pytest.raises(NotFoundError, match=r"no preset 'nope'.*tiny-qwen3\.5"):
        runs.complete_spec(studio, "preset: nope")


def test_an_unknown_dataset_is_refused(studio: Studio) -> None:
    with pytest.raises(NotFoundError, match="no dataset 'nope'"):
        runs.submit(studio, spec(studio, data={"dataset": "nope"}))


def test_an_unknown_tiny_model_is_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match=r"no tiny model 'tiny/llama'"):
        runs.submit(studio, spec(studio, model={"id": "tiny/llama"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("preset: tiny-qwen3.5\noptim: {learning_rate: .nan}", "optim.learning_rate is nan"),
        ("preset: tiny-qwen3.5\nlora: {rank: 0}", "lora.rank is 0"),
        ("preset: tiny-qwen3.5\ntrust_remote_code: true", "trust_remote_code is not a field"),
        ("lora: {targets: [everything]}", "lora.targets.0 is 'everything'"),
        ("- a\n- b", "holds list, not fields"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_spec_is_answered_with_field_and_value(
    studio: Studio, text: str, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        runs.complete_spec(studio, text)
    assert words in str(caught.value)


def test_a_stopped_run_is_queued_again_and_a_worker_hears_of_it(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    runs.stop(studio, row.id)

    resumed = runs.resume(studio, row.id)

    assert (resumed.state, resumed.finished_at) == (RunState.QUEUED, None)
    assert cast(FakeDispatch, studio.dispatch).rung == [Bell.TRAIN, Bell.TRAIN]


def test_a_failed_run_that_is_resumed_forgets_why_it_failed(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    lease = start(studio, row.id)
    with studio.database.write() as session:
        words = {"error": {"type": "EngineError", "message": "Out of memory.", "hint": ""}}
        assert leases.finish(session, lease, RunState.FAILED, words)

    resumed = runs.resume(studio, row.id)

    assert (resumed.state, resumed.error) == (RunState.QUEUED, None)


def test_only_what_is_over_and_not_finished_is_resumed(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    with pytest.raises(ConflictError, match=f"Run {row.id} is QUEUED"):
        runs.resume(studio, row.id)
    with pytest.raises(NotFoundError, match="no run 99"):
        runs.resume(studio, 99)


def test_a_queued_run_stops_at_once(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    assert runs.stop(studio, row.id).state == RunState.STOPPED
    with pytest.raises(ConflictError, match="is STOPPED already"):
        runs.stop(studio, row.id)


def test_a_running_run_is_asked_to_stop_and_may_be_asked_twice(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    start(studio, row.id)
    assert runs.stop(studio, row.id).state == RunState.STOPPING
    assert runs.stop(studio, row.id).state == RunState.STOPPING


def test_what_does_not_exist_is_named(studio: Studio) -> None:
    with pytest.raises(NotFoundError, match="no run 7"):
        runs.get(studio, 7)
    with pytest.raises(NotFoundError, match="no run 7"):
        runs.stop(studio, 7)
    with pytest.raises(NotFoundError, match="no merge 7"):
        artifacts.get(studio, 7)
    with pytest.raises(NotFoundError, match="no chat 7"):
        chats.get(studio, 7)


def test_a_run_that_learned_nothing_can_be_neither_merged_nor_talked_to(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    for verb in (artifacts.merge, chats.open_chat):
        with pytest.raises(ConflictError, match=f"Run {row.id} is QUEUED and has learned nothing"):
            verb(studio, row.id)


def test_a_merge_is_ordered_once(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    runs.stop(studio, row.id)
    runs.folder(studio, row.id).adapter.mkdir(parents=True)
    assert artifacts.merge(studio, row.id).id == artifacts.merge(studio, row.id).id


def test_the_third_chat_makes_the_least_used_one_go(studio: Studio) -> None:
    ids = []
    for _ in range(3):
        row = runs.submit(studio, spec(studio))
        runs.stop(studio, row.id)
        runs.folder(studio, row.id).adapter.mkdir(parents=True)
        ids.append(chats.open_chat(studio, row.id).id)
        with studio.database.write() as session:
            leases.claim(session, ChatRow, holder=holder("w"), max_live=9)
    assert [chats.get(studio, n).state for n in ids] == ["STOPPING", "RUNNING", "RUNNING"]


def test_opening_the_same_chat_twice_gives_one_process(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    runs.stop(studio, row.id)
    runs.folder(studio, row.id).adapter.mkdir(parents=True)
    assert chats.open_chat(studio, row.id).id == chats.open_chat(studio, row.id).id


def test_a_log_shows_no_control_characters(studio: Studio) -> None:
    row = runs.submit(studio, spec(studio))
    log = runs.folder(studio, row.id).log
    log.parent.mkdir(parents=True)
    log.write_bytes(b"\x1b[31mred\x1b[0m\nnext\x00\xff")
    assert run_files.log_tail(studio, row.id) == "[31mred[0m\nnext\N{REPLACEMENT CHARACTER}"


def test_the_chosen_preset_fills_in_what_a_spec_leaves_out(studio: Studio) -> None:
    short = runs.complete_spec(studio, "preset: tiny-qwen3.5\ntrain: {max_steps: 3}")
    whole = studio.presets["tiny-qwen3.5"].job_spec()
    assert short.train.max_steps == 3
    assert short.optim == whole.optim
    assert short.lora == whole.lora
