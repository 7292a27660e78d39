"""The processes of a run, as one process sees them; two are in test_distributed."""

from collections import Counter

import pytest
import torch

from studio.domain.spec import OptimSpec
from studio.domain.train_spec import TrainSpec
from studio.errors import EngineError, InputError
from workers.engine.parallel import refuse_optimizer
from workers.engine.world import World, open_world


@pytest.fixture
def world() -> World:
    return open_world(TrainSpec(num_gpus=0))


def ranks(world: World, size: int) -> list[World]:
    """Return the same process as each rank of a larger run would see itself."""
    return [
        World(
            accelerator=world.accelerator,
            device=world.device,
            rank=rank,
            size=size,
            num_nodes=1,
        )
        for rank in range(size)
    ]


def test_one_process_needs_no_group(world: World) -> None:
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_alone_everything_is_as_given(world: World) -> None:
    value = torch.tensor([1.5, 2.0])
    assert torch.equal(world.sum(value), value)
    assert world.vote(True, False) == (True, False)
    assert world.first_of(None) is None
    assert world.from_main(lambda: {"step": 3}) == {"step": 3}
    assert world.main_first(lambda: 4) == 4
    world.barrier()


def test_what_rank_0_cannot_do_is_said(world: World) -> None:
    def refuse() -> None:
        raise InputError("No.", "Do that.", "train.seed")

    with pytest.raises(InputError, match="No") as caught:
        world.from_main(refuse)
    assert caught.value.field == "train.seed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(EngineError, match="asks for 2 GPUs, but PyTorch finds no CUDA GPU") as got:
        open_world(TrainSpec(num_gpus=2))
    assert got.value.field == "train.num_gpus"
    assert "Set GPUs to 0" in got.value.hint


def test_processes_that_do_not_fit_the_machines_are_refused() -> None:
    with pytest.raises(
        InputError, match="2 machines without GPUs, and 1 process was started in all"
    ):
        open_world(TrainSpec(num_gpus=0, num_nodes=2))


@pytest.mark.parametrize(("size", "count"), [(2, 3), (2, 4), (4, 1), (3, 7), (1, 5)])
def test_every_rank_takes_as_many_and_each_counts_once(world: World, size: int, count: int) -> None:
    batches = list(range(count))
    shares = [one.shares(batches) for one in ranks(world, size)]
    assert len({len(share) for share in shares}) == 1
    counted: Counter[int] = Counter()
    for share in shares:
        for batch, weight in share:
            counted[batch] += int(weight)
    assert counted == Counter(batches)


def test_dropout_differs_by_rank_and_the_adapter_does_not(world: World) -> None:
    first, dropped = [], []
    for one in ranks(world, 3):
        one.seed_adapter(5)
        first.append(torch.rand(4))
        one.seed_training(5)
        dropped.append(torch.rand(4))
    assert all(torch.equal(first[0], other) for other in first)
    assert len({tuple(drawn.tolist()) for drawn in dropped}) == 3


def test_optimizers_that_cannot_step_shares_are_refused(world: World) -> None:
    two = ranks(world, 2)[0]
    refuse_optimizer(OptimSpec(optimizer="paged_adamw_8bit"), world)
    refuse_optimizer(OptimSpec(optimizer="adamw"), two)
    with pytest.raises(EngineError, match="The optimizer paged_adamw_8bit works on one GPU") as got:
        refuse_optimizer(OptimSpec(optimizer="paged_adamw_8bit"), two)
    assert got.value.field == "optim.optimizer"
