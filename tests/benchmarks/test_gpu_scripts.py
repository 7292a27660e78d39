"""The GPU benchmarks on a CPU, at tiny shapes: they run, time nothing, and notice what is wrong."""

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from benchmarks.gpu import (
    attention,
    grouped,
    kernels,
    layer,
    nf4,
    plan,
    run_all,
    slim_wheel,
    stock,
    whole,
)
from benchmarks.gpu.chat import SUPERVISED, chat_lengths, random_examples
from benchmarks.gpu.flops import linear_weights, mixer_flop, step_flop
from benchmarks.gpu.presets import PRESETS, architecture_of, config_of, preset_of
from benchmarks.gpu.random_base import build_base
from benchmarks.gpu.record import OUT_OF_MEMORY, Record
from studio.domain.architecture import read_architecture
from workers.engine import experts, varlen
from workers.engine.coverage import prove_coverage
from workers.engine.quantize import expert_weight

SCRIPTS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "kernels": (kernels.main, []),
    "grouped": (grouped.main, []),
    "nf4": (nf4.main, []),
    "attention": (attention.main, []),
    "layer": (layer.main, ["--models", "80b"]),
    "whole": (whole.main, ["--model", "80b", "--experts", "--recompute", "1"]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_of(folder: Path, script: str) -> list[dict[str, Any]]:
    lines = (folder / f"{script}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run_tiny(script: str, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    main, options = SCRIPTS[script]
    code = main([*options, "--device", "cpu", "--tiny", "--out", str(folder)])
    return code, rows_of(folder, script)


def record_in(folder: Path) -> Record:
    return Record("trial", argparse.Namespace(device="cpu", tiny=True, out=str(folder)))


# ---- they run, and say nothing that was not measured ----------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_times_nothing_on_a_cpu(script: str, tmp_path: Path) -> None:
    code, rows = run_tiny(script, tmp_path)
    assert code == 0
    assert rows[0]["part"] == "machine"
    assert rows[0]["versions"]["torch"]
    assert any(row.get("passed") for row in rows)
    assert {row["sitting"] for row in rows} == {rows[0]["sitting"]}
    timings = {
        key: value
        for row in rows
        for key, value in row.items()
        if key.endswith(("_ms", "_s", "_gib", "tflops", "mfu", "use")) and key != "budget_gib"
    }
    assert timings
    assert set(timings.values()) == {None}


def test_a_whole_model_is_trained_as_the_spec_says(tmp_path: Path) -> None:
    code = whole.main(
        ["--model", "35b", "--depth", "4", "--recompute", "2", "--lengths", "one",
         "--accumulate", "2", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    row = next(row for row in rows_of(tmp_path, "whole") if row["part"] == "whole")
    assert (row["depth"], row["recomputed"], row["method"]) == (4, 2, "qlora")
    more = row["more"][0]
    assert len(more["losses"]) == 4  # one to warm up and three
    assert all(loss > 0 for loss in more["losses"])
    assert more["executed_flop"] > more["model_flop"] > 0
    assert row["trained"] > 0
    assert row["budget_gib"] > 0


def test_a_whole_model_that_runs_out_of_memory_is_tried_with_more_layers_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = whole.measure, list[int]()

    def small_card(run: plan.Run) -> None:
        tried.append(len(run.budget.recomputed))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no room")
        real(run)

    monkeypatch.setattr(whole, "measure", small_card)
    options = ["--model", "80b", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert whole.main(options) == 0
    assert tried == [0, 2, 4]
    row = next(row for row in rows_of(tmp_path, "whole") if "step_s" in row)
    assert (row["recomputed"], row["more"][0]["retries"]) == (4, 2)


def test_the_stock_way_runs_on_the_same_model_or_says_what_is_missing(tmp_path: Path) -> None:
    code = stock.main(["--model", "9b", "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    row = rows_of(tmp_path, "stock")[1]
    assert code == 0
    assert row["part"] == ("TRL" if find_spec("trl") else "TRL is not installed")
    assert "broke" not in row


def test_routed_experts_reach_bitsandbytes_as_they_were_packed() -> None:
    base = build_base(config_of("80b", is_tiny=True), "qlora", torch.device("cpu"))
    name = "model.layers.0.mlp.experts"
    wanted = expert_weight(base.get_submodule(name), "down_proj", torch.float32)
    stock.parametrise_experts(base)
    found = base.get_submodule(name).down_proj
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, wanted)


def test_what_does_not_fit_the_model_is_refused_in_words(tmp_path: Path) -> None:
    options = ["--model", "9b", "--experts", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert whole.main(options) == 0
    assert "routed_experts" in rows_of(tmp_path, "whole")[-1]["why"]


def test_real_shapes_are_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        nf4.main(["--device", "cpu", "--out", str(tmp_path)])


# ---- they notice what is wrong ------------------------------------------------------------------


def test_a_delta_rule_that_leaks_between_documents_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(_record: Record, _documents: Sequence[int], inputs: Any) -> torch.Tensor:
        return kernels.by_document(kernels.plain_rule(64), [inputs[0].shape[1]], inputs)

    monkeypatch.setattr(kernels, "tried_rule", leaking)
    code, rows = run_tiny("kernels", tmp_path)
    equal = {row["documents"]: row["passed"] for row in rows if "equality" in row["part"]}
    assert code == 1
    assert equal == {"tiny": True, "tiny packed": False}


def test_attention_that_leaks_between_documents_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention.attend
    monkeypatch.setattr(attention, "attend", lambda inputs, lengths: real(inputs, [sum(lengths)]))
    assert run_tiny("attention", tmp_path)[0] == 1


def test_a_product_that_skips_rows_or_groups_fails() -> None:
    sizes = torch.tensor([3, 0, 5, 2])
    x, weight = torch.randn(10, 8), torch.randn(4, 8, 6)
    parts = zip(torch.split(x, sizes.tolist()), weight, strict=True)
    right = torch.cat([rows @ matrix for rows, matrix in parts])
    assert grouped.error_of(lambda: right, x, weight, sizes) < 1e-6
    lost, unwritten = right.clone(), right.clone()
    lost[9] = 0
    unwritten[4] = torch.nan
    assert grouped.error_of(lambda: lost, x, weight, sizes) > 0.1
    assert grouped.error_of(lambda: unwritten, x, weight, sizes) == float("inf")


def test_weights_that_come_back_wrong_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "expert_weight", lambda *given: expert_weight(*given).roll(1, 0))
    assert run_tiny("nf4", tmp_path)[0] == 1


def test_experts_with_wrong_gradients_fail_the_gate_and_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = experts._Projection.low_rank_grads  # noqa: SLF001

    def transposed(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = real(*given)
        return a.flip(0), b

    monkeypatch.setattr(experts._Projection, "low_rank_grads", transposed)  # noqa: SLF001
    code, rows = run_tiny("layer", tmp_path)
    assert code == 1
    gates = {row["side"]: row["passed"] for row in rows if row["part"] == "gate"}
    timed = {row["side"] for row in rows if row["part"] == "times"}
    assert gates["ours, NF4"] is False
    assert gates["PEFT, grouped_mm"] is True
    assert "ours, NF4" not in timed
    assert "PEFT, grouped_mm" in timed


def test_packed_documents_that_see_each_other_stop_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(plain: Any) -> Any:
        def convolve(*given: Any, activation: str | None = None, **_bounds: Any) -> Any:
            return inspect.unwrap(plain)(*given, activation=activation)

        return convolve

    monkeypatch.setattr(varlen, "_convolution", leaking)
    code, rows = run_tiny("whole", tmp_path)
    assert code == 1
    assert [row["passed"] for row in rows if row["part"] == "gate"] == [False]
    assert all("step_s" not in row for row in rows)


# ---- what they are made of ----------------------------------------------------------------------


def test_a_random_base_is_the_base_that_the_engine_would_load() -> None:
    config = config_of("80b", is_tiny=True)
    first, again = (build_base(config, "qlora", torch.device("cpu")) for _ in range(2))
    assert prove_coverage(first, "qlora").passed
    named = dict(again.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, named[name]), name
        assert not parameter.requires_grad
        assert parameter.numel() < 2 or parameter.float().std() > 0, name
    # Norms of this family are stored as distance from 1, but for the gated one.
    layers = dict(first.named_parameters())
    assert abs(layers["model.norm.weight"].mean()) < 0.1
    assert abs(layers["model.layers.0.linear_attn.norm.weight"].mean() - 1) < 0.1


def test_operations_are_those_of_the_published_shapes() -> None:
    # Counted by hand from the shapes of Qwen3-Next-80B-A3B, in GFLOP a token at documents of 4,096.
    model, tokens = architecture_of("80b"), 4096
    layers = range(len(model.layers))
    mixers = [mixer_flop(model, number, [tokens]) / tokens / 1e9 for number in layers]
    attention_flop = sum(value for number, value in enumerate(mixers) if number % 4 == 3)
    assert attention_flop == pytest.approx(0.40, abs=0.005)
    assert sum(mixers) - attention_flop == pytest.approx(0.19, abs=0.005)
    assert 2 * sum(linear_weights(model)) / 1e9 == pytest.approx(6.50, abs=0.01)
    everything = step_flop(model, [tokens], tokens, layers)
    assert everything.model / tokens / 1e9 == pytest.approx(16.3, abs=0.1)
    assert everything.executed / tokens / 1e9 == pytest.approx(23.4, abs=0.1)


@pytest.mark.parametrize("total", [96, 4096, 32768])
def test_chats_fill_a_row_exactly(total: int) -> None:
    lengths = chat_lengths(total, seed=1)
    assert sum(lengths) == total
    assert len(lengths) > 1
    assert min(lengths) >= 16
    examples = random_examples(lengths, 1000, seed=1)
    supervised = sum(int(example.mask.sum()) for example in examples)
    assert supervised / total == pytest.approx(SUPERVISED, abs=0.05)
    assert len({int(token) for example in examples for token in example.tokens}) > total / 100


def test_every_size_is_a_preset_with_its_model() -> None:
    for name in PRESETS:
        assert preset_of(name).spec["model"]["id"]
        assert len(architecture_of(name).layers) == config_of(name)["num_hidden_layers"]
        assert len(read_architecture(config_of(name, depth=8)).layers) == 8


def test_what_breaks_is_a_row_and_the_next_is_measured(tmp_path: Path) -> None:
    record = record_in(tmp_path)

    def no_memory() -> None:
        raise torch.OutOfMemoryError("no room")

    def broken() -> None:
        raise RuntimeError("first line\nsecond line")

    assert record.attempt("a", no_memory, tokens=1) == OUT_OF_MEMORY
    assert record.failures == 0
    assert record.attempt("a", broken, tokens=2) == "RuntimeError: first line"
    assert record.attempt("a", lambda: record.row("a", tokens=3, passed=True)) == ""
    assert record.exit_code() == 1
    found = [(row.get("tokens"), row.get("broke")) for row in rows_of(tmp_path, "trial")[1:]]
    assert found == [(1, OUT_OF_MEMORY), (2, "RuntimeError: first line"), (3, None)]


# ---- all of them --------------------------------------------------------------------------------


def test_all_goes_on_behind_a_failure_and_does_not_repeat_what_is_done(tmp_path: Path) -> None:
    log = tmp_path / "run_all.jsonl"
    options = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    parts = [
        run_all.Part(name="refused", module="run_all", seconds=60, options=("--nonsense",)),
        run_all.Part(name="endless", module="layer", seconds=1),
        run_all.Part(name="good", module="slim_wheel", seconds=60, options=("--help",)),
    ]
    assert run_all.run(parts, options, log, 300) == 1
    ended = {row["name"]: row["ended"] for row in rows_of(tmp_path, "run_all")}
    assert ended == {"refused": "failed", "endless": "cut off", "good": "done"}
    assert run_all.already_done(log) == {"good"}
    assert run_all.run(parts[2:], options, log, 0) == 1
    assert rows_of(tmp_path, "run_all")[-1]["ended"] == "no time left"


def test_all_knows_every_option_of_what_it_starts() -> None:
    for part in run_all.PARTS:
        if part.module in ("whole", "stock"):
            plan.options(None).parse_args(part.options)
    assert len({part.name for part in run_all.PARTS}) == len(run_all.PARTS)


def test_a_slim_wheel_keeps_one_library_and_a_true_record(tmp_path: Path) -> None:
    wheel, names = tmp_path / "bitsandbytes-1-none-any.whl", ["cuda121", "cuda130", "cpu"]
    files = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in names]
    files = ["bitsandbytes/__init__.py", *files]
    with ZipFile(wheel, "w") as whole_wheel:
        for file in files:
            whole_wheel.writestr(file, "x")
        record = "".join(f"{file},sha256=x,1\n" for file in files)
        whole_wheel.writestr("bitsandbytes-1.dist-info/RECORD", record)
    assert slim_wheel.main([str(wheel), str(tmp_path / "slim")]) == 0
    with ZipFile(tmp_path / "slim" / wheel.name) as slim:
        assert "bitsandbytes/libbitsandbytes_cuda121.so" not in slim.namelist()
        assert "bitsandbytes/libbitsandbytes_cuda130.so" in slim.namelist()
        assert "cuda121" not in slim.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert slim_wheel.main([str(wheel), str(tmp_path / "slim"), "--cuda", "999"]) == 1
