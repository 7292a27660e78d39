"""The loss on what is never trained on, over supervised tokens only."""

import torch
from peft import PeftModel

from workers.engine.batches import MicroBatch, count_supervised, micro_batches
from workers.engine.data import Examples
from workers.engine.lora import base_of
from workers.engine.loss import supervised_loss


def batch_loss(model: PeftModel, batch: MicroBatch, num_supervised: int) -> torch.Tensor:
    """Return the share of a micro-batch in the mean loss of `num_supervised` tokens.

    Args:
        model: Base and adapter.
        batch: On the model's device.
        num_supervised: Supervised tokens of all micro-batches that are summed.
    """
    base = base_of(model)
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    output = decoder(batch.tokens, attention_mask=batch.mask, use_cache=False)
    return supervised_loss(
        output.last_hidden_state, batch.labels, head, num_supervised=max(1, num_supervised)
    )


@torch.no_grad()
def evaluation_loss(
    model: PeftModel, examples: Examples, *, micro_batch_size: int, pad_token_id: int
) -> float:
    """Return the mean loss over every supervised token of `examples`, without dropout.

    Args:
        model: Base and adapter; its mode is as before afterwards.
        examples: What is measured.
        micro_batch_size: Examples of one forward pass.
        pad_token_id: Fills the rest of a row.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    num_supervised = int(examples.supervised.sum())
    loss = torch.zeros((), device=device, dtype=torch.float64)
    # Longest first: what does not fit into memory shows at once.
    order = (-examples.lengths.astype(int)).argsort(kind="stable").tolist()
    for start in range(0, len(order), micro_batch_size):
        rows = [examples[index] for index in order[start : start + micro_batch_size]]
        if not count_supervised(rows):
            continue
        for batch in micro_batches(rows, micro_batch_size, pad_token_id):
            loss += batch_loss(model, batch.to(device), num_supervised)
    model.train(was_training)
    return float(loss)
