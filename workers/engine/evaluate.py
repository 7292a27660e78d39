"""The loss on what is never trained on, over supervised tokens only, and when it says stop."""

from collections.abc import Sequence

import torch

from workers.engine.batches import collate
from workers.engine.data import Examples
from workers.engine.loss import batch_loss
from workers.engine.parallel import Root
from workers.engine.world import World


@torch.no_grad()
def evaluation_loss(
    root: Root, examples: Examples, world: World, *, micro_batch_size: int, pad_token_id: int
) -> float:
    """Return the mean loss over every supervised token of `examples`, without dropout.

    Args:
        root: The model on all ranks; its mode is as before afterwards.
        examples: What is measured, the same on every rank.
        world: The ranks, which share the work.
        micro_batch_size: Examples of one forward pass.
        pad_token_id: Fills the rest of a row.
    """
    num_supervised = int(examples.supervised.sum())
    # Longest first: what does not fit into memory shows at once.
    order = (-examples.lengths.astype(int)).argsort(kind="stable")
    order = order[examples.supervised[order] > 0]
    rows = [
        order[start : start + micro_batch_size].tolist()
        for start in range(0, len(order), micro_batch_size)
    ]
    was_training = root.training
    root.train(False)
    loss = torch.zeros((), device=world.device, dtype=torch.float64)
    try:
        for indices, weight in world.shares(rows) if rows else ():
            batch = collate([examples[index] for index in indices], pad_token_id, packed=False)
            loss += weight * root(batch_loss, batch.to(world.device), num_supervised)
    finally:
        root.train(was_training)
    return float(world.sum(loss))


def is_hopeless(evaluations: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Tell whether the last evaluations were no better than the best one before them.

    Args:
        evaluations: Step and loss, in their order.
        patience: How many in a row are enough; None never stops.
    """
    if patience is None or not evaluations:
        return False
    losses = [loss for _, loss in evaluations]
    return len(losses) - 1 - losses.index(min(losses)) >= patience
