"""A program of one rank: trains small models on as many processes as started it.

    torchrun --nproc-per-node=2 tests/workers/engine/ranks.py ORDER.json

ORDER.json is a list of Case. The same function runs in the test's own process, alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from studio.disk import RunFolder
from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import OptimSpec
from studio.domain.train_spec import TrainSpec
from studio.errors import InputError
from workers.engine.checkpoint import Progress, load_checkpoint, save_adapter, save_checkpoint
from workers.engine.full import train_all
from workers.engine.lora import add_adapter
from workers.engine.loss import supervised_loss
from workers.engine.model import load_base
from workers.engine.optim import build_optimizer
from workers.engine.parallel import Root, clip_gradients, whole_tensor, wrap
from workers.engine.world import World, open_world

IGNORED = -100


class Case(BaseModel):
    """One training."""

    name: str
    base: Path
    method: str
    targets: tuple[str, ...] = ("attention", "delta_net")
    out: Path
    steps: int = 4
    dropout: float = 0.0
    num_nodes: int = 1
    recompute: bool = False
    compute_dtype: str | None = None
    save_at: int | None = None
    resume: Path | None = None


def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return three micro-batches of a step: two ranks cannot have the same number of them."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for length in (12, 9, 7):
        tokens = torch.randint(1, 128, (2, length), generator=generator)
        labels = tokens.clone()
        labels[:, : length // 2] = IGNORED
        made.append((tokens, labels))
    return made


def loss_of(
    model: Any, tokens: torch.Tensor, labels: torch.Tensor, supervised: int
) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = base.get_decoder()(tokens, use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    return supervised_loss(hidden, labels, head, num_supervised=supervised)


def load(case: Case) -> Any:
    # Bytes stay whole on every rank; floats are shared out.
    storage = torch.float32 if case.method == "qlora-floats" else torch.uint8
    method: Any = case.method.removesuffix("-floats")
    return load_base(case.base, method=method, storage=storage)


def build(case: Case, world: World) -> tuple[Root, torch.optim.Optimizer]:
    model = load(case)
    world.seed_adapter(7)
    if case.method == "full":
        train_all(model)
    else:
        lora = LoraSpec(rank=4, alpha=8, dropout=case.dropout, targets=case.targets)
        model = add_adapter(model, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # not zero, so that A has a gradient from the first step on
                    parameter.normal_(std=0.02)
    if case.recompute:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    world.seed_training(7)
    dtype = getattr(torch, case.compute_dtype) if case.compute_dtype else None
    root = wrap(model.train(), world, compute_dtype=dtype)
    optimizer = build_optimizer(root.model.named_parameters(), OptimSpec(learning_rate=3e-3))
    return root, optimizer


def train(case: Case, world: World) -> list[float]:
    """Train a case; rank 0 writes what was measured and what was trained."""
    root, optimizer = build(case, world)
    run = RunFolder(path=case.out)
    shares = bytes_of_ranks(root, world)
    progress = Progress(step=0, base_id="tiny/x")
    if case.resume is not None:
        progress = load_checkpoint(case.resume, root.model, optimizer, world)
    while progress.step < case.steps:
        made = batches(progress.step)
        supervised = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in made)
        total = torch.zeros(())
        for (tokens, labels), weight in world.shares(made):
            share = weight * root(loss_of, tokens, labels, supervised)
            world.accelerator.backward(share)
            total += share.detach()
        norm = clip_gradients(root.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.losses.append(float(world.sum(total)))
        progress.notes["norms"] = [*progress.notes.get("norms", []), norm]
        progress.step += 1
        if progress.step == case.save_at:
            save_checkpoint(run, root.model, optimizer, world, progress)
    write(case, world, root.model)
    if world.is_main:
        told = {"losses": progress.losses, "norms": progress.notes["norms"], "bytes": shares}
        (case.out / "told.json").write_text(json.dumps(told), encoding="utf-8")
    return progress.losses


def bytes_of_ranks(root: Root, world: World) -> list[int]:
    """Return the bytes of weights that each rank holds."""
    mine = torch.zeros(world.size, dtype=torch.int64)
    for parameter in root.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        mine[world.rank] += local.numel() * local.element_size()
    return [int(number) for number in world.sum(mine)]


def write(case: Case, world: World, model: nn.Module) -> None:
    trained = {
        name: whole_tensor(parameter.detach()).contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if case.method != "full":
        save_adapter(model, "tiny/x", case.out / "adapter")  # type: ignore[arg-type]
    if world.is_main:
        case.out.mkdir(parents=True, exist_ok=True)
        save_file(trained, case.out / "trained.safetensors")


def agree(case: Case, world: World) -> None:
    """Write what each rank hears of the others, and what the model says before any step."""

    def refuse() -> None:
        raise InputError(f"Rank {world.rank} said no.", "Do that.", "train.seed")

    refusal = ""
    try:
        world.from_main(refuse)
    except InputError as error:
        refusal = error.message
    last = world.rank == world.size - 1
    met = world.first_of(InputError("The last one met it.", code=65) if last else None)
    cache = case.out / "cache"
    is_filled = world.main_first(lambda: _fill(cache))
    root, _ = build(case, world)
    root.model.eval()
    with torch.no_grad():
        reply = root(_reply, torch.arange(1, 8)[None])
        loss = root(loss_of, *batches(0)[0], 1)
    told = {
        "refusal": refusal,
        "is_filled": is_filled,
        "met": (met.message, met.code) if met else None,
        "vote": world.vote(last, False, world.rank == 0),
        "main": world.from_main(lambda: world.rank),
        "reply": reply.tolist(),
        "loss": float(loss),
        "dropout": float(torch.rand(())),
    }
    (case.out / f"agreed-{world.rank}.json").write_text(json.dumps(told), encoding="utf-8")


def _fill(cache: Path) -> bool:
    """Return whether somebody was here before."""
    is_filled = cache.exists()
    cache.touch()
    return is_filled


def _reply(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    reply: torch.Tensor = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    return reply


def main() -> None:
    torch.set_num_threads(1)
    cases = [Case.model_validate(case) for case in json.loads(Path(sys.argv[1]).read_text())]
    world = open_world(TrainSpec(num_gpus=0))
    for case in cases:
        with_nodes = World(
            accelerator=world.accelerator,
            device=world.device,
            rank=world.rank,
            size=world.size,
            num_nodes=case.num_nodes,
        )
        train(case, with_nodes)
    agree(cases[0], world)
    world.close()


if __name__ == "__main__":
    main()
