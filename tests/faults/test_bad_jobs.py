"""Jobs that cannot be: each is refused, or ends, with a sentence. Ids: the catalogue of faults, J.

Cases with a home of their own: J07 (missing folder), J08, J13, J14: tests/workers/engine; J10, J20:
tests/studio/services; J12: test_kills.py; J15, J16: test_real_trainer.py, test_disks.py; J17, J18:
tests/workers/test_merge*.py; J21: test_crowds.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from studio.domain.outcome import ExitCode, is_retried
from studio.domain.spec import JobSpec, ModelRef
from studio.errors import InputError, NotFoundError, StudioError
from studio.services import datasets, runs
from studio.services.studio import Studio
from tests.fakes import make_studio
from tests.faults.scene import Scene
from workers.gpus import parse

PRESET = "tiny-qwen3.5"
NUMBER = "input should be a valid number, unable to parse string as a number"
POSITIVE = "input should be greater than 0"
FINITE = "input should be a finite number"
FIX = "Correct the fields named here."


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Studio:
    """An installation with one Dataset."""
    studio = make_studio(tmp_path_factory.mktemp("home"), verdicts)
    datasets.import_example(studio)
    return studio


def check(studio: Studio, **changes: Any) -> JobSpec:
    """Check a job as the page does before it queues one."""
    [dataset] = datasets.listing(studio)
    preset = changes.pop("preset", PRESET)
    data = {"dataset": dataset.name, **changes.pop("data", {})}
    spec = runs.spec_from_preset(studio, preset, {"data": data, **changes})
    runs.new_row(studio, spec)
    return spec


def refusal(studio: Studio, **changes: Any) -> StudioError:
    with pytest.raises(InputError) as caught:
        check(studio, **changes)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        pytest.param("optim.learning_rate", 0, f"0: {POSITIVE}", id="J01-zero"),
        pytest.param("optim.learning_rate", -1, f"-1: {POSITIVE}", id="J01-negative"),
        pytest.param(
            "optim.learning_rate",
            1e9,
            "1000000000.0: input should be less than or equal to 1",
            id="J01-huge",
        ),
        pytest.param("optim.learning_rate", math.nan, f"nan: {FINITE}", id="J01-nan"),
        pytest.param("optim.learning_rate", "NaN", f"'NaN': {FINITE}", id="J01-nan-as-text"),
        pytest.param("optim.learning_rate", "1,5e-4", f"'1,5e-4': {NUMBER}", id="J01-comma"),
        pytest.param("optim.learning_rate", "", f"'': {NUMBER}", id="J01-empty"),
        pytest.param("train.epochs", 0, f"0: {POSITIVE}", id="J02-no-epochs"),
        pytest.param("train.epochs", -1, f"-1: {POSITIVE}", id="J02-negative-epochs"),
        pytest.param(
            "train.epochs",
            1e6,
            "1000000.0: input should be less than or equal to 1000",
            id="J02-huge-epochs",
        ),
        pytest.param("train.epochs", math.nan, f"nan: {FINITE}", id="J02-nan-epochs"),
        pytest.param("train.epochs", "1,5e-4", f"'1,5e-4': {NUMBER}", id="J02-comma-epochs"),
        pytest.param(
            "batch.micro_batch_size",
            0,
            "0: input should be greater than or equal to 1",
            id="J02-empty-batch",
        ),
        pytest.param(
            "batch.micro_batch_size",
            1.5,
            "1.5: input should be a valid integer, got a number with a fractional part",
            id="J02-half-a-batch",
        ),
        pytest.param(
            "data.max_length_tokens",
            10**7,
            "10000000: input should be less than or equal to 1010000",
            id="J02-huge-length",
        ),
        pytest.param(
            "lora.rank", 0, "0: input should be greater than or equal to 1", id="J04-no-rank"
        ),
        pytest.param("lora.alpha", math.nan, f"nan: {FINITE}", id="J04-nan-alpha"),
        pytest.param("version", 2, "2: input should be 1", id="J05-another-version"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_field_value_and_range(
    studio: Studio, field: str, value: object, words: str
) -> None:
    changes: Any = value
    for part in reversed(field.split(".")):
        changes = {part: changes}
    error = refusal(studio, **changes)
    assert error.message == f"{field} is {words}."
    assert (error.hint, error.field) == (FIX, field)


def test_j01_a_number_with_a_space_behind_it_is_that_number(studio: Studio) -> None:
    assert check(studio, optim={"learning_rate": "1e-4 "}).optim.learning_rate == 1e-4


def test_j03_layers_that_the_model_does_not_have_are_named_with_those_it_has(
    studio: Studio,
) -> None:
    error = refusal(studio, lora={"targets": [], "modules": ["nowhere.q_proj"]})
    assert error.message == "No layer of this model is called 'nowhere.q_proj'."
    assert error.hint.startswith("This model has: embed_tokens, linear_attn.in_proj_qkv, ")
    assert error.field == "lora.modules"
    error = refusal(studio, lora={"targets": ["routed_experts"]})
    assert error.message == "LoRA target routed_experts matches nothing in this model."
    assert error.hint.startswith("This model has: attention, delta_net, ")


def test_j04_a_rank_that_no_layer_can_use_is_said(studio: Studio) -> None:
    error = refusal(studio, lora={"rank": 1000})
    assert error.message.startswith("Rank 1000 is more than any chosen layer can use")
    assert (error.hint, error.field) == ("Choose a rank of at most 256.", "lora.rank")


def test_j05_an_unknown_preset_is_answered_with_those_that_exist(studio: Studio) -> None:
    with pytest.raises(NotFoundError) as caught:
        check(studio, preset="tiny-qwen35")
    assert caught.value.message == "There is no preset 'tiny-qwen35'."
    assert caught.value.hint.startswith("Choose one of: tiny-qwen3.5, ")


@pytest.mark.parametrize("key", ["trust_remote_code", "output_dir", "deepspeed"])
@pytest.mark.parametrize("section", ["", "train"])
def test_j06_a_key_that_is_no_field_is_named(studio: Studio, key: str, section: str) -> None:
    name = f"{section}.{key}".removeprefix(".")
    error = refusal(studio, **({section: {key: "x"}} if section else {key: "x"}))
    assert error.message == f"{name} is not a field of a JobSpec."


def test_j07_a_model_folder_that_is_missing_is_said_before_the_run(studio: Studio) -> None:
    error = refusal(studio, model={"id": "/nowhere/model"})
    assert error.message == "/nowhere/model is no model folder: config.json cannot be read."
    assert error.field == "model.id"


@pytest.mark.parametrize(
    "code",
    [ExitCode.INPUT, ExitCode.DATA, ExitCode.NUMERIC, ExitCode.MEMORY, ExitCode.MACHINE],
)
def test_j07_j11_what_would_end_the_same_way_is_not_tried_again(
    scene: Scene, code: ExitCode
) -> None:
    words = {"type": "InputError", "message": "So it is.", "hint": "Do that.", "code": int(code)}
    scene.need_worker()
    scene.script(says=words)
    row = scene.finish(run_id := scene.submit())
    assert (row.state, row.epoch, row.error) == ("FAILED", 1, words)
    assert scene.told(run_id, "failed") == ["So it is."]
    scene.script()
    assert scene.finish(scene.submit()).state == "FINISHED"  # the next run starts


@pytest.mark.parametrize("code", [ExitCode.UNEXPECTED, ExitCode.RETRY])
def test_p23_what_may_help_is_tried_once_more_and_no_more(scene: Scene, code: ExitCode) -> None:
    words = {"type": "RuntimeError", "message": "So it is.", "hint": "", "code": int(code)}
    scene.need_worker()
    scene.script(says=words)
    row = scene.finish(run_id := scene.submit())
    scene.script()
    assert is_retried(code)
    assert (row.state, row.epoch) == ("FAILED", 2)
    assert row.error is not None
    assert row.error["message"] == "So it is. It had been tried again from there before."
    assert scene.told(run_id, "crashed") == [
        "So it is. It is tried once more, from its latest checkpoint."
    ]


@pytest.mark.slow
def test_j09_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    studio: Studio,
) -> None:
    from workers.engine.model import find_base, load_tokenizer  # 8 s

    folder = find_base(ModelRef(id="tiny/qwen3.5"), studio.home)
    load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 96}}))
    with pytest.raises(StudioError) as caught:
        load_tokenizer(folder)
    assert caught.value.message.startswith(f"The tokenizer in {folder} has ")
    assert caught.value.message.endswith(
        " tokens, and the model knows 96: they are not of the same model."
    )


def test_j22_a_card_that_has_fallen_off_the_bus_is_left_out() -> None:
    whole = "0, GPU-aa, NVIDIA H100, 81559, 0"
    lost = "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost."
    assert [card.uuid for card in parse(f"{whole}\n{lost}\n")] == ["GPU-aa"]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "a/b\\c",
        "C:\\x",
        "<script>alert(1)</script>",
        "'; rm -rf ~; '",
        "$(touch x)",
        "\u202egnp.exe",
    ],
)
def test_j23_a_name_is_text_and_the_folder_is_the_number(studio: Studio, name: str) -> None:
    [dataset] = datasets.listing(studio)
    changes = {"name": name, "data": {"dataset": dataset.name}}
    row = runs.submit(studio, runs.spec_from_preset(studio, PRESET, changes))
    assert row.name == name.replace("\u202e", "")
    assert runs.folder(studio, row.id).path == studio.home.runs / f"{row.id:06d}"


def test_j23_a_name_without_an_end_and_one_of_many_lines(studio: Studio) -> None:
    error = refusal(studio, name="x" * 10_240)
    assert error.field == "name"
    assert error.message.endswith("string should have at most 120 characters.")
    assert len(error.message) < 200
    assert check(studio, name="a\nb\x00c\x1b[31m").name == "abc[31m"
