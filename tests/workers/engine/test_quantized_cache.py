"""The second start reads the weights in 4 bits, the same ones, or makes them anew."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from studio.locks import take_lock
from tests.workers.engine.checkpoints import CONFIGS, write_checkpoint
from workers.engine import quantized_cache
from workers.engine.coverage import prove_coverage
from workers.engine.model import load_base
from workers.engine.quantize import four_bit_tensors, nf4_states
from workers.engine.quantized_cache import MANIFEST, QuantizedCache

TOKENS = torch.arange(5, 45)[None]


@pytest.fixture
def base(tmp_path: Path, bases: dict[str, Path]) -> Path:
    return write_checkpoint("qwen3_next", tmp_path / "base", bases["qwen3.5"])


@pytest.fixture
def cache(tmp_path: Path) -> QuantizedCache:
    return QuantizedCache(folder=tmp_path / "quantized", min_base_bytes=0, min_free_bytes=0)


def entries(cache: QuantizedCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_dir())


def spoil(base: Path) -> None:
    """Fill the base's shards with zeros; size and time stay, so that only reading can tell."""
    for shard in base.glob("*.safetensors"):
        status = shard.stat()
        shard.write_bytes(bytes(status.st_size))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def everything(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()
    yield from model.named_buffers()
    for name, parameter in four_bit_tensors(model):
        for part, value in parameter.quant_state.as_dict(packed=True).items():
            yield f"{name}.{part}", value
    for path, module in model.named_modules():
        for name, state in nf4_states(module).items():
            for part, value in state.as_dict(packed=True).items():
                yield f"{path}.{name}.{part} of the module", value


@pytest.mark.parametrize("family", CONFIGS)
def test_the_kept_weights_are_those_of_a_direct_load_and_the_base_is_not_read(
    family: str, bases: dict[str, Path], cache: QuantizedCache, tmp_path: Path
) -> None:
    base = write_checkpoint(family, tmp_path / "base", bases["qwen3.5"])
    direct = load_base(base, method="qlora")
    load_base(base, method="qlora", cache=cache)
    spoil(base)
    kept = load_base(base, method="qlora", cache=cache)
    ours, theirs = dict(everything(kept)), dict(everything(direct))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logits = kept(TOKENS, use_cache=False).logits
    assert torch.equal(logits, direct(TOKENS, use_cache=False).logits)
    assert not any(p.requires_grad for p in kept.parameters())
    assert kept.config.to_dict() == direct.config.to_dict()
    assert kept.name_or_path == direct.name_or_path == str(base)
    assert prove_coverage(kept, "qlora") == prove_coverage(direct, "qlora")


def test_a_base_without_settings_of_generation_is_kept_as_it_loads(
    base: Path, cache: QuantizedCache
) -> None:
    (base / "generation_config.json").unlink()
    direct = load_base(base, method="qlora", cache=cache)
    spoil(base)
    kept = load_base(base, method="qlora", cache=cache)
    assert kept.generation_config is not None
    assert direct.generation_config is not None
    assert kept.generation_config.to_dict() == direct.generation_config.to_dict()


def test_tied_heads_and_other_storage_are_kept_too(
    bases: dict[str, Path], cache: QuantizedCache, tmp_path: Path
) -> None:
    base = write_checkpoint("qwen3", tmp_path / "base", bases["qwen3.5"], tie_word_embeddings=True)
    first = load_base(base, method="qlora", cache=cache, storage=torch.float32)
    spoil(base)
    kept = load_base(base, method="qlora", cache=cache, storage=torch.float32)
    model: Any = kept
    assert model.lm_head.weight is model.model.embed_tokens.weight
    index = json.loads((entries(cache)[0] / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert all(p.dtype == torch.float32 for _, p in four_bit_tensors(kept))
    logits = kept(TOKENS, use_cache=False).logits
    assert torch.equal(logits, first(TOKENS, use_cache=False).logits)


def damage_file(entry: Path) -> None:
    path = entry / "layer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut_file(entry: Path) -> None:
    path = entry / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_file(entry: Path) -> None:
    (entry / "outside.safetensors").unlink()


def remove_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()


def write_nonsense(entry: Path) -> None:
    (entry / MANIFEST).write_text("[1, 2")


def age(entry: Path) -> None:
    values = json.loads((entry / MANIFEST).read_text())
    (entry / MANIFEST).write_text(json.dumps({**values, "format": 0}))


def forget_index(entry: Path) -> None:
    (entry / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    "harm",
    [
        damage_file,
        cut_file,
        remove_file,
        remove_manifest,
        write_nonsense,
        age,
        forget_index,
    ],
)
def test_what_is_not_as_it_was_written_is_made_anew(
    harm: Any, base: Path, cache: QuantizedCache
) -> None:
    direct = dict(everything(load_base(base, method="qlora", cache=cache)))
    (entry,) = entries(cache)
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    harm(entry)
    again = dict(everything(load_base(base, method="qlora", cache=cache)))
    assert all(torch.equal(again[name], direct[name]) for name in direct)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == before


def test_another_base_version_or_setting_has_an_entry_of_its_own(
    base: Path, cache: QuantizedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"storage": "uint8"}
    names = {cache.entry(base, settings), cache.entry(base, {"storage": "bfloat16"})}
    monkeypatch.setattr(quantized_cache, "FORMAT", quantized_cache.FORMAT + 1)
    names.add(cache.entry(base, settings))
    shard = next(base.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    names.add(cache.entry(base, settings))
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    names.add(cache.entry(base, settings))
    assert len(names) == 5
    assert None not in names


def test_small_bases_are_not_kept(base: Path, tmp_path: Path) -> None:
    cache = QuantizedCache(folder=tmp_path / "quantized")
    load_base(base, method="qlora", cache=cache)
    assert not cache.folder.exists()


# ---- room ---------------------------------------------------------------------------------------


def test_the_longest_unused_entries_make_way(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    roomy = QuantizedCache(folder=folder, min_base_bytes=0, min_free_bytes=0)
    load_base(base, method="qlora", cache=roomy)
    (first,) = entries(roomy)
    size = sum(path.stat().st_size for path in first.iterdir())
    load_base(base, method="qlora", cache=roomy, storage=torch.float32)
    (second,) = (path for path in entries(roomy) if path != first)
    os.utime(first / MANIFEST, ns=(10, 10))
    os.utime(second / MANIFEST, ns=(20, 20))
    load_base(base, method="qlora", cache=roomy)  # now the first was used last
    tight = QuantizedCache(
        folder=folder, min_base_bytes=0, min_free_bytes=0, max_bytes=int(2.5 * size)
    )
    load_base(base, method="qlora", cache=tight, storage=torch.bfloat16)
    assert first in entries(tight)
    assert second not in entries(tight)
    assert len(entries(tight)) == 2


@pytest.mark.parametrize("limit", ["max_bytes", "min_free_bytes"])
def test_without_room_nothing_is_kept_and_the_load_goes_on(
    limit: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"max_bytes": 1000} if limit == "max_bytes" else {"min_free_bytes": 2**60}
    limits: dict[str, int] = {"min_base_bytes": 0, "min_free_bytes": 0, **values}
    cache = QuantizedCache(folder=tmp_path / "quantized", **limits)
    assert dict(four_bit_tensors(load_base(base, method="qlora", cache=cache)))
    assert entries(cache) == []
    assert "not kept for the next start" in caplog.text


def test_an_entry_that_is_being_read_does_not_make_way(base: Path, cache: QuantizedCache) -> None:
    load_base(base, method="qlora", cache=cache)
    (first,) = entries(cache)
    full = QuantizedCache(
        folder=cache.folder, min_base_bytes=0, min_free_bytes=0, max_bytes=400_000
    )
    with cache.reading(first) as is_whole:
        assert is_whole
        load_base(base, method="qlora", cache=full, storage=torch.float32)
        assert entries(cache) == [first]
    load_base(base, method="qlora", cache=full, storage=torch.float32)
    assert first not in entries(cache)


def test_one_process_writes_and_what_a_killed_one_left_is_removed(
    base: Path, cache: QuantizedCache
) -> None:
    entry = cache.entry(base, {"any": 1})
    assert entry is not None
    model = load_base(base, method="qlora")
    cache.folder.mkdir()
    left = cache.folder / f".{entry.name}.abcdef"
    left.mkdir()
    lock = take_lock(entry.with_name(f"{entry.name}.lock"))
    assert lock is not None
    with lock:
        assert not cache.store(model, base, entry)
        assert left.exists()
    assert cache.store(model, base, entry)
    assert not left.exists()
    assert entries(cache) == [entry]


def test_a_full_or_read_only_disk_does_not_stop_the_run(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quantized").write_text("a file where the folder should be")
    cache = QuantizedCache(folder=tmp_path / "quantized", min_base_bytes=0, min_free_bytes=0)
    assert dict(four_bit_tensors(load_base(base, method="qlora", cache=cache)))
    assert "not kept for the next start" in caplog.text
