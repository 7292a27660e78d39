"""What a run reads: Datasets by hash, truncated, mixed, split; and what stops it."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from studio.disk import Home, RunFolder
from studio.domain.conversation import Conversation, Message, PlainText, Preference, Record
from studio.errors import EngineError, InputError
from tests.workers.engine.conftest import MakeExamples, small_spec, store
from workers.engine.data import RunData, read_data


def talk(*texts: str, weight: Any = 1) -> Conversation:
    roles: tuple[Literal["user"], Literal["assistant"]] = ("user", "assistant")
    return Conversation(
        messages=tuple(
            Message(role=roles[at % 2], content=text, weight=weight if at % 2 else 1)
            for at, text in enumerate(texts)
        )
    )


def facts(word: str, count: int) -> list[Conversation]:
    return [talk(f"{word} {number * 7919}?", f"{word} {number} it is.") for number in range(count)]


def read(home: Home, base: Path, run: RunFolder, said: list[str], **data: Any) -> RunData:
    for file in home.datasets.glob("*.jsonl"):
        link = run.datasets / file.name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(file)
    return read_data(run, small_spec(data=data), base, said.append)


@pytest.fixture
def run(home: Home) -> RunFolder:
    folder = home.run(len(list(home.runs.iterdir())) + 1)
    folder.path.mkdir()
    return folder


def test_progress_is_said_and_the_second_run_finds_the_tokens(
    home: Home, bases: dict[str, Path], run: RunFolder
) -> None:
    path, said = store(home, facts("progress", 20)), list[str]()
    first = read(home, bases["qwen3.5"], run, said, dataset=path.stem)
    assert said[0] == "reading the dataset"
    assert said[-1] == "tokenising 100 %"
    said.clear()
    again = read(home, bases["qwen3.5"], run, said, dataset=path.stem)
    assert said == ["reading the dataset"]
    assert first.training.sources[0].cache.folder == again.training.sources[0].cache.folder
    assert first.evaluation is None


def test_a_dataset_that_changed_since_it_was_validated_is_refused(
    home: Home, bases: dict[str, Path], run: RunFolder
) -> None:
    path = store(home, facts("changed", 3))
    path.write_bytes(path.read_bytes().replace(b"changed 1 it", b"changed 7 it"))
    with pytest.raises(EngineError, match="was changed since it was validated") as caught:
        read(home, bases["qwen3.5"], run, [], dataset=path.stem)
    assert path.stem[:12] in caught.value.message
    path.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        read(home, bases["qwen3.5"], run, [], dataset=path.stem)


def test_a_file_that_holds_no_records_is_a_sentence(run: RunFolder, bases: dict[str, Path]) -> None:
    run.dataset.write_text("no conversation\n")
    with pytest.raises(InputError, match="Line 1 of the dataset's file is no record"):
        read_data(run, small_spec(), bases["qwen3.5"], lambda _: None)
    run.dataset.write_bytes(talk("a", "b").to_line() + b'{"messages": 7}\n')
    with pytest.raises(InputError, match="Line 2 of the dataset's file is no record"):
        read_data(run, small_spec(), bases["qwen3.5"], lambda _: None)


# ---- mixtures and evaluation --------------------------------------------------------------------


def test_a_mixture_holds_its_datasets_one_after_the_other(
    home: Home, bases: dict[str, Path], run: RunFolder
) -> None:
    first, second = store(home, facts("first", 6)), store(home, facts("second", 4))
    mixture = [{"dataset": second.stem, "weight": 2.5}]
    data = read(home, bases["qwen3.5"], run, [], dataset=first.stem, mixture=mixture)
    assert len(data.training) == 10
    assert [part.per_epoch for part in data.training.parts] == [6, 10]
    assert data.training.per_epoch == 16
    assert [data.training[index].line for index in range(10)] == [*range(6), *range(4)]
    assert data.training.lengths.tolist() == [len(e.tokens) for e in data.training]
    assert data.training.name_of(data.training.place_of(0)) == "1"
    assert data.training.name_of(data.training.place_of(7)) == f"2 of dataset {second.stem[:12]}"


def test_an_evaluation_share_is_kept_out_of_training(
    home: Home, bases: dict[str, Path], run: RunFolder
) -> None:
    # Every conversation stands there twice, and both are on the same side.
    path = store(home, [talk for talk in facts("share", 20) for _ in range(2)])
    data = read(home, bases["qwen3.5"], run, [], dataset=path.stem, eval_share=0.25)
    assert data.evaluation is not None
    trained = {example.line for example in data.training}
    measured = {example.line for example in data.evaluation}
    assert trained | measured == set(range(40))
    assert not trained & measured
    assert 2 <= len(measured) <= 10
    assert {line ^ 1 for line in measured} == measured


def test_a_share_of_a_single_conversation_is_a_sentence(
    home: Home, bases: dict[str, Path], run: RunFolder
) -> None:
    path = store(home, facts("alone", 1))
    with pytest.raises(EngineError, match="Nothing can be kept out of training") as caught:
        read(home, bases["qwen3.5"], run, [], dataset=path.stem, eval_share=0.5)
    assert caught.value.field == "data.eval_share"


def test_a_second_dataset_is_measured(home: Home, bases: dict[str, Path], run: RunFolder) -> None:
    first, second = store(home, facts("train", 6)), store(home, facts("eval", 4))
    data = read(home, bases["qwen3.5"], run, [], dataset=first.stem, eval_dataset=second.stem)
    assert data.evaluation is not None
    assert (len(data.training), len(data.evaluation)) == (6, 4)


# ---- what cannot be trained ---------------------------------------------------------------------


def long_talks() -> list[Conversation]:
    many = ["What is it? " * 4, "It is a tide station, and it is here. " * 4] * 4
    return [talk(*many), talk("Short?", "Yes.")]


@pytest.mark.parametrize("policy", ["cut", "split"])
def test_long_conversations_are_cut_as_the_spec_says(
    policy: str, make_examples: MakeExamples
) -> None:
    family = "qwen3-next"
    whole = make_examples(long_talks(), family, max_length_tokens=2000)
    assert len(whole) == 2
    least = whole.lengths.max() // 2
    cut = make_examples(long_talks(), family, max_length_tokens=least, truncation=policy)
    assert cut.lengths.max() <= least
    assert cut[0].line == 0
    assert cut[len(cut) - 1].line == 1
    assert (len(cut) > 2) == (policy == "split")
    lost = int(whole.supervised.sum()) - int(cut.supervised.sum())
    assert lost == sum(source.fitted.lost_supervised for source in cut.sources)
    assert (lost > 0) == (policy == "cut")


def test_when_nothing_is_left_the_length_that_is_needed_is_named(
    make_examples: MakeExamples,
) -> None:
    talks = [talk("Why? " * 40, "Because. " * 30), talk("Why? " * 30, "Because. " * 20)]
    needed = int(make_examples(talks, max_length_tokens=2000).lengths.min())
    for policy in ("cut", "split"):
        with pytest.raises(EngineError) as caught:
            make_examples(talks, max_length_tokens=32, truncation=policy)
        assert caught.value.message == (
            "0 of 2 conversations of the dataset keep a trained token at 32 tokens; the shortest "
            f"needs {needed}."
        )
        assert len(make_examples(talks, max_length_tokens=needed, truncation=policy)) == 1


def test_conversations_that_the_template_refuses_are_named(make_examples: MakeExamples) -> None:
    system = Message(role="system", content="Be brief.")
    late = Conversation(messages=(*talk("a", "b").messages, system, *talk("c", "d").messages))
    with pytest.raises(EngineError, match="cannot read 2 of 4 conversations") as caught:
        make_examples([talk("a", "b"), late, talk("c", "d"), late])
    assert "lines 2, 4." in caught.value.message
    assert "System message must be at the beginning" in caught.value.message


def test_preferences_are_refused_and_texts_are_read(make_examples: MakeExamples) -> None:
    answer = (Message(role="assistant", content="Yes."),)
    pair: Record = Preference(messages=talk("a").messages, chosen=answer, rejected=answer)
    with pytest.raises(EngineError, match="A preference holds a better and a worse reply"):
        make_examples([pair])
    examples = make_examples([PlainText(text="The tide comes and goes.")])
    assert examples.supervised.tolist() == (examples.lengths - 1).tolist()
    assert examples[0].mask.all()


def test_conversations_without_weight_are_counted_and_left_out(make_examples: MakeExamples) -> None:
    examples = make_examples([talk("a", "b"), talk("c", "d", weight=0)])
    assert len(examples) == 1
    assert examples.sources[0].cache.meta.counts.unsupervised == (1,)
    assert np.array_equal(examples.sources[0].fitted.lines, [0])
