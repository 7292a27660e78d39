"""The processes of one run: who they are, what each of them trains on, how they agree.

torchrun starts one process per GPU (`torchrun --nproc-per-node=N -m workers.engine RUN_DIR`, on
every machine with --nnodes and a rendezvous). On the CPU any number of processes may run one
spec: that is how sharding is tested. One process is the same code; nothing is exchanged then.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.environment import CPUInformation, get_cpu_distributed_information

from studio.domain.outcome import ExitCode
from studio.domain.train_spec import TrainSpec
from studio.errors import EngineError, InputError, StudioError

log = logging.getLogger(__name__)

T = TypeVar("T")

# One rank downloads and tokenises while the others wait. A rank that dies ends the others
# through torchrun, so nothing waits that long for a dead one.
TIMEOUT = timedelta(hours=4)
# More ranks than any run has: dropout of (seed, rank) never repeats that of another pair.
_SEEDS_PER_RUN = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of one run, seen from one of them.

    Attributes:
        accelerator: Holds the process group.
        device: Where this process computes.
        rank: From 0 to `size` - 1; rank 0 writes what the outside reads.
        size: Processes of the run, on all machines.
        num_nodes: Machines.
    """

    accelerator: Accelerator
    device: torch.device
    rank: int
    size: int
    num_nodes: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks; each rank gets it.

        Args:
            value: Same shape and dtype on every rank; it is not changed.
        """
        total = value.detach().clone().to(self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def vote(self, *wishes: bool) -> tuple[bool, ...]:
        """Return of each wish whether any rank has it.

        SIGTERM reaches the ranks at different moments, and rank 0 alone reads what else is asked
        for: voting once a step, at the same place, all of them do the same behind the same step.
        """
        if self.size == 1:
            return wishes
        votes = torch.tensor([int(wish) for wish in wishes], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())

    def first_of(self, error: StudioError | None) -> StudioError | None:
        """Return on every rank what the first of those met that met anything."""
        if self.size == 1:
            return error
        met: list[StudioError | None] = [None] * self.size
        dist.all_gather_object(met, error)
        return next((one for one in met if one is not None), None)

    def from_main(self, decide: Callable[[], T]) -> T:
        """Return on every rank what `decide` returns on rank 0; it runs there alone.

        Raises:
            StudioError: What `decide` raises on rank 0, on every rank.
        """
        if self.size == 1:
            return decide()
        said: list[Any] = [None, None]
        met: Exception | None = None
        if self.is_main:
            try:
                said[0] = decide()
            except StudioError as error:
                met = said[1] = error
            except Exception as error:  # noqa: BLE001  # raised again below, once the others know
                met = error
                said[1] = EngineError(
                    f"Rank 0 failed: {error}.", "See log.txt.", code=ExitCode.UNEXPECTED
                )
        dist.broadcast_object_list(said, src=0, device=self.device)
        if met is not None:
            raise met
        if said[1] is not None:
            raise said[1]
        return said[0]  # type: ignore[no-any-return]

    def main_first(self, act: Callable[[], T]) -> T:
        """Return what `act` returns on each rank; the others begin when rank 0 has filled a cache.

        Raises:
            StudioError: What `act` raises on rank 0, on every rank.
        """
        done: list[T] = []
        self.from_main(lambda: done.append(act()))
        return done[0] if done else act()

    def shares(self, micro_batches: Sequence[T]) -> list[tuple[T, float]]:
        """Return what this rank computes of a step: every `size`-th micro-batch, from its own.

        Every forward and backward pass gathers weights from all ranks, so all take the same
        number of them: a rank that would have one less repeats the first of the step at weight
        0. (Its gradients are then zeros of the right shape; an empty micro-batch would skip the
        collectives of the backward pass, and the others would wait for ever.)

        Args:
            micro_batches: Those of the whole step, the same on every rank; each has supervised
                tokens.

        Returns:
            Micro-batches, and what their loss is multiplied by: 1 or 0.
        """
        mine = [(batch, 1.0) for batch in micro_batches[self.rank :: self.size]]
        most = -(-len(micro_batches) // self.size)
        return mine + [(micro_batches[0], 0.0)] * (most - len(mine))

    def seed_adapter(self, seed: int) -> None:
        """Seed what all ranks must draw alike: the first values of the Adapter."""
        torch.manual_seed(seed)

    def seed_training(self, seed: int) -> None:
        """Seed what each rank must draw for itself: dropout and noise.

        Rank 0 goes on with the numbers that follow those of the Adapter, as a run of one process
        always did.
        """
        if self.rank:
            torch.manual_seed(seed * _SEEDS_PER_RUN + self.rank)

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def open_world(train: TrainSpec) -> World:
    """Join the processes of a run.

    Args:
        train: `num_gpus` a machine and `num_nodes`; 0 GPUs is the CPU, with as many processes as
            were started.

    Raises:
        InputError: The spec asks for machines without GPUs.
        EngineError: This machine has fewer GPUs, or torchrun started another number of processes.
    """
    started: CPUInformation = get_cpu_distributed_information()
    if train.num_gpus:
        _refuse_missing_gpus(train.num_gpus)
        _refuse_other_number(train, started)
    elif started.world_size % train.num_nodes:
        count = started.world_size
        were = "1 process was" if count == 1 else f"{count} processes were"
        raise InputError(
            f"The run asks for {train.num_nodes} machines without GPUs, and {were} started in "
            "all: that cannot be the same number on each.",
            "Set machines to 1.",
            "train.num_nodes",
        )
    is_cpu = train.num_gpus == 0
    # A named backend makes Accelerate look for a group, which only torchrun's processes have.
    # Checkpoints exchange tensors of the CPU, so a group of GPUs speaks gloo beside nccl.
    backend = None
    if dist.is_torchelastic_launched():
        backend = "gloo" if is_cpu else "cuda:nccl,cpu:gloo"
    group = InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)
    # No autocast: the base is in its own precision already, and what trains is float32 on purpose.
    accelerator = Accelerator(cpu=is_cpu, mixed_precision="no", kwargs_handlers=[group])
    world = World(
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        num_nodes=train.num_nodes,
    )
    log.info("Rank %d of %d on %s", world.rank, world.size, world.device)
    return world


def _refuse_missing_gpus(num_gpus: int) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus <= there:
        return
    wanted = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    found = "no CUDA GPU" if not there else f"only {there}"
    raise EngineError(
        f"The run asks for {wanted}, but PyTorch finds {found} on this machine.",
        f"Set GPUs to {there}, or start a worker on a machine with more."
        if there
        else "Set GPUs to 0 (tiny models only), or start a worker on a machine with a GPU.",
        "train.num_gpus",
    )


def _refuse_other_number(train: TrainSpec, started: CPUInformation) -> None:
    wanted = train.num_gpus * train.num_nodes
    if (started.world_size, started.local_world_size) == (wanted, train.num_gpus):
        return
    raise EngineError(
        f"The run asks for {train.num_gpus} GPUs on each of {train.num_nodes} machines, so for "
        f"{wanted} processes, but {started.world_size} were started, {started.local_world_size} "
        "of them here.",
        f"Start it on every machine with torchrun --nnodes={train.num_nodes} "
        f"--nproc-per-node={train.num_gpus} and the same --rdzv-endpoint.",
        "train.num_gpus",
    )
