"""Merge what a run has learned into its base, shard by shard, and certify the result.

    python -m workers.merge ORDER_DIR

ORDER_DIR holds order.json (MergeOrder); it receives model/ (an ordinary Hugging Face folder),
certificate.json and stage.json (studio/disk.py). Exit code 0: see the certificate, which may say
that the merge fails; otherwise see error.json (workers/process.py).

An Adapter is added to the base. A model that a run trained as a whole is taken over as it is.
The base's own files are copied, not saved anew by transformers: that would lose `mtp.*` and
`visual.*`, which the text class does not load. Not covered: GGUF, hub upload (workers/export.py).
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from studio.disk import OrderFolder, write_whole
from studio.domain.certificate import Certificate
from studio.domain.orders import MergeOrder, parse_order
from studio.errors import MachineError, disk_errors
from workers.adapter import read_adapter
from workers.certify import certify
from workers.engine.model import find_base
from workers.low_rank import Change
from workers.placing import Place, changed, place
from workers.process import run_order, tell_stage
from workers.shards import Shards, find_shards, open_shard

SPARE_SHARE = 0.05  # beside the weights: tokenizer, configs, blocks half used
_WRITING_ENDS_AT = 0.5  # of the whole work, for the bar on the page
# The base's weights in other formats: they would lie beside the merge and be the base, unmerged.
_WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
)


def main() -> int:
    """Carry out the order that the command line names.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m workers.merge", description="Merge one run.")
    parser.add_argument("order_dir", type=Path, help="folder with order.json")
    return run_order(OrderFolder(path=parser.parse_args().order_dir.resolve()), merge)


def merge(folder: OrderFolder) -> None:
    """Write the merged model and its Certificate.

    Args:
        folder: Folder of the order.

    Raises:
        InputError: The order or the base model is wrong.
        EngineError: Base, Adapter or trained model cannot be read, or do not fit each other.
        MachineError: The disk has no room.
    """
    order = parse_order(MergeOrder, folder.order.read_text(encoding="utf-8"))
    tell_stage(folder, "reading", order.model.id, 0.0)
    base = find_shards(find_base(order.model, folder.home))
    trained = None if order.trained is None else find_shards(Path(order.trained))
    adapter = None if order.adapter is None else read_adapter(Path(order.adapter))
    places = {} if adapter is None else place(adapter, base)
    with _fresh_model_folder(folder) as temporary:
        source = trained or base
        free_bytes = shutil.disk_usage(folder.path).free
        check_space(needed_bytes=needed_bytes(source), free_bytes=free_bytes, where=folder.path)
        with disk_errors("writing the merged model"):
            changes = {} if adapter is None else adapter.changes
            write_weights(folder, source, changes, places, temporary)
            copy_other_files(base, temporary)
            if trained is not None:
                # Over the base's: what the run says of its own model goes before.
                copy_other_files(trained, temporary)
        certificate = certify(folder, order=order, base=base, merged=temporary)
        _publish(folder, certificate, temporary)
    tell_stage(folder, "done", "passed" if certificate.passed else "failed", 1.0)


def needed_bytes(base: Shards) -> int:
    """Return how much a merge of this base takes on the disk."""
    return int(base.num_bytes * (1 + SPARE_SHARE))


def check_space(*, needed_bytes: int, free_bytes: int, where: Path) -> None:
    """Refuse a merge that would fill the disk.

    Raises:
        MachineError: There is less room than needed; says both numbers.
    """
    if free_bytes < needed_bytes:
        raise MachineError(
            f"A merge needs {needed_bytes / 1e9:.1f} GB on the disk of {where}, "
            f"{free_bytes / 1e9:.1f} GB are free.",
            "Free some space, or move the home folder with --home DIR. Chat needs no merge.",
        )


def write_weights(
    folder: OrderFolder,
    base: Shards,
    changes: Mapping[str, Change],
    places: Mapping[str, Place],
    target: Path,
) -> None:
    """Write every shard of the base under its own name, with the changes added.

    Args:
        folder: Folder of the order, told how far it is.
        base: Shards of the base.
        changes: What to add, by the name of the parameter.
        places: Which tensors receive it; all others are copied bit for bit.
        target: Folder to write into.
    """
    written_bytes = 0
    for name in base.files:
        done = written_bytes / base.num_bytes
        tell_stage(folder, "writing", name, _WRITING_ENDS_AT * done)
        with open_shard(base.folder / name) as shard:
            metadata = shard.metadata()
            tensors = {key: shard.get_tensor(key) for key in base.keys(name)}
        here = {key: places[key] for key in tensors if key in places}
        for path, keys in _by_path(here).items():
            parts = changes[path].parts()
            for key in keys:
                tensors[key] = changed(tensors[key], places[key], parts)
        _save(tensors, target / name, metadata)
        written_bytes += (base.folder / name).stat().st_size


def _by_path(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Return the tensors that each parameter of the Adapter changes."""
    keys: dict[str, list[str]] = {}
    for key, where in places.items():
        keys.setdefault(where.path, []).append(key)
    return keys


def copy_other_files(base: Shards, target: Path) -> None:
    """Copy all files of the base that are not weights: configs, tokenizer, chat template, index."""
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and path.suffix not in _WEIGHT_SUFFIXES:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            # copyfile, not copy: a base may be read-only, and files of the hub cache are links.
            shutil.copyfile(path, target / name)


def _publish(folder: OrderFolder, certificate: Certificate, temporary: Path) -> None:
    text = certificate.model_dump_json(indent=2)
    write_whole(temporary / folder.certificate.name, text)
    temporary.rename(folder.weights)
    write_whole(folder.certificate, text)


@contextmanager
def _fresh_model_folder(folder: OrderFolder) -> Iterator[Path]:
    """Yield a folder beside `weights`; what an earlier or failed attempt left is removed."""
    prefix = f".{folder.weights.name}."
    for leftover in [folder.weights, *folder.path.glob(f"{prefix}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    folder.certificate.unlink(missing_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.path, prefix=prefix))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors hides the error number of the disk in its text.
        raise MachineError(
            f"The shard {path.name} cannot be written: {error}.",
            "Free some space, or move the home folder with --home DIR.",
        ) from error
    # Brought to the disk, so that no rename outlives its content in a power cut.
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
