"""A Dataset as a model reads it: the inspector, the figures and a run's epoch tell the same."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.domain.data_spec import DataSpec, MixturePart
from studio.domain.spec import JobSpec, ModelRef
from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.errors import EngineError, InputError, NotFoundError
from studio.intake.read import no_progress
from studio.services import datasets, readings, tokenizers
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from studio.tokens.statistics import Epoch
from tests.fakes import make_studio

TINY = ModelRef(id="tiny/qwen3.5")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Studio]:
    studio = make_studio(tmp_path_factory.mktemp("home"), verdicts)
    yield studio
    studio.inspector.close()


def talk(number: int, words: int) -> dict[str, object]:
    turns = (("user", f"Question {number}?"), ("assistant", f"Answer {number} " + "tide " * words))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def stored(studio: Studio, folder: Path, name: str, *records: object) -> DatasetRow:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    row = datasets.import_file(studio, path).row
    assert row is not None
    return row


@pytest.fixture(scope="module")
def short(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> DatasetRow:
    """Four short conversations and a long one."""
    records = [*(talk(number, 3) for number in range(4)), talk(4, 200)]
    return stored(studio, tmp_path_factory.mktemp("data"), "short", *records)


def test_the_figures_add_up_what_the_inspector_shows(studio: Studio, short: DatasetRow) -> None:
    seen = [readings.inspect(studio, short.name, number, TINY, DataSpec()) for number in range(5)]
    found = readings.statistics(studio, short.name, TINY, DataSpec(), progress=no_progress)

    shown = [example for inspection in seen for example in inspection.examples]
    assert found.tokens == sum(example.tokens for example in shown)
    assert found.supervised == sum(example.supervised for example in shown)
    assert found.examples == len(shown)
    assert found.lengths.longest == max(example.tokens for example in shown)


def test_a_record_that_is_not_there_is_said(studio: Studio, short: DatasetRow) -> None:
    with pytest.raises(NotFoundError, match="no record 6 in short: they go from 1 to 5"):
        readings.inspect(studio, short.name, 5, TINY, DataSpec())


def test_a_plan_counts_a_mixture_by_its_weights(
    studio: Studio, short: DatasetRow, tmp_path: Path
) -> None:
    other = stored(studio, tmp_path, "other", *(talk(number, 5) for number in range(10, 20)))
    spec = JobSpec(
        model=TINY,
        data=DataSpec(dataset=short.name, mixture=(MixturePart(dataset=other.name, weight=2),)),
        batch=BatchSpec(micro_batch_size=5, gradient_accumulation_steps=1),
        train=TrainSpec(epochs=2),
    )

    plan = readings.plan(studio, spec, no_progress)

    shares = {share.dataset: share for share in plan.mixture.parts}
    assert shares["short"].examples == 5
    assert shares["other"].examples == 20
    assert plan.mixture.total.examples == 25
    assert plan.mixture.total.steps == 10
    alone = readings.statistics(studio, other.name, TINY, DataSpec(), progress=no_progress)
    assert shares["other"].tokens == 2 * alone.tokens


def test_a_plan_counts_the_steps_of_packed_rows(studio: Studio, tmp_path: Path) -> None:
    many = stored(studio, tmp_path, "many", *(talk(number, 5) for number in range(100, 140)))
    train = TrainSpec(epochs=3)

    def planned(packing: bool) -> Epoch:
        batch = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=2, packing=packing)
        data = DataSpec(dataset=many.name, max_length_tokens=128)
        spec = JobSpec(model=TINY, data=data, batch=batch, train=train)
        return readings.plan(studio, spec, no_progress).mixture.total

    padded, packed = planned(packing=False), planned(packing=True)
    assert (padded.steps, padded.tokens) == (30, packed.tokens)
    # Rows of 256 tokens, two a step.
    assert 3 * packed.tokens / 512 <= packed.steps < 3 * packed.tokens / 512 / 0.8
    assert packed.is_packed
    assert packed.efficiency > 0.8


def test_a_plan_says_what_is_too_long(studio: Studio, short: DatasetRow) -> None:
    data = DataSpec(dataset=short.name, max_length_tokens=64)

    plan = readings.plan(studio, JobSpec(model=TINY, data=data), no_progress)

    assert plan.num_too_long == 1
    assert plan.longest > 64
    assert plan.lost_tokens == plan.longest


def test_a_plan_leaves_out_what_is_kept_for_evaluation(studio: Studio, short: DatasetRow) -> None:
    whole = JobSpec(model=TINY, data=DataSpec(dataset=short.name))
    data = DataSpec(dataset=short.name, eval_share=0.4)

    plan = readings.plan(studio, JobSpec(model=TINY, data=data), no_progress)

    assert plan.num_kept_out == 2
    assert plan.mixture.total.conversations == 3
    assert readings.plan(studio, whole, no_progress).mixture.total.conversations == 5


def test_a_plan_names_what_training_and_evaluation_share(
    studio: Studio, short: DatasetRow, tmp_path: Path
) -> None:
    measured = stored(studio, tmp_path, "measured", talk(0, 3), talk(77, 3))
    data = DataSpec(dataset=short.name, eval_dataset=measured.name)

    plan = readings.plan(studio, JobSpec(model=TINY, data=data), no_progress)

    assert set(plan.overlaps) == {"short"}
    assert (plan.overlaps["short"].exact, plan.overlaps["short"].num_eval) == (1, 2)


def test_a_model_folder_is_read_with_its_own_template(
    studio: Studio, short: DatasetRow, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(tokenizers.folder_of(studio, TINY), folder)
    template = folder / "chat_template.jinja"
    mine = ModelRef(id=str(folder))

    same = readings.inspect(studio, short.name, 0, mine, DataSpec())
    assert same == readings.inspect(studio, short.name, 0, TINY, DataSpec())
    template.write_text("{{ raise_exception('Not today.') }}")

    with pytest.raises(InputError, match="Not today"):
        readings.inspect(studio, short.name, 0, mine, DataSpec())
    figures = readings.statistics(studio, short.name, mine, DataSpec(), progress=no_progress)
    assert figures.num_refused == 5
    assert "Not today" in figures.refused[0].message


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("tiny/none", NotFoundError, "There is no tiny model 'tiny/none'"),
        ("/none", InputError, "holds no tokenizer.json"),
        ("not a hub id", NotFoundError, "There is no model 'not a hub id'"),
    ],
)
def test_a_model_without_a_tokenizer_is_said(
    studio: Studio, model: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        tokenizers.folder_of(studio, ModelRef(id=model))


def test_a_hub_that_cannot_be_reached_is_said(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(EngineError, match="the Hugging Face hub cannot be reached"):
        tokenizers.folder_of(studio, ModelRef(id="Qwen/Qwen3.5-9B"))


def test_tiny_models_are_offered_first(studio: Studio) -> None:
    offered = tokenizers.choices(studio)

    here = [model_id.startswith("tiny/") for _, model_id in offered]
    assert here == sorted(here, reverse=True)
    assert {model_id for _, model_id in offered} == set(studio.models)
    titles = {model_id: title for title, model_id in offered}
    assert "not downloaded" in titles["Qwen/Qwen3.5-9B"]
