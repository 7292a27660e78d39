"""The main job from end to end, through the same services that the page uses.

Example data set -> preset tiny-qwen3.5 -> QLoRA on the CPU -> merge -> certificate -> chat with
base and tuned model side by side -> ten factual questions, which only the tuned model can answer.
"""

from typing import TypeVar

from studio import terminal
from studio.domain.run import RunState
from studio.errors import EngineError
from studio.services import artifacts, chats, datasets, runs
from studio.services.studio import Studio
from studio.services.workers import need_worker
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from studio.terminal import err, out

_Row = TypeVar("_Row", bound=JobRow)

PRESET = "tiny-qwen3.5"
MIN_RIGHT = 8


def run_demo(studio: Studio) -> bool:
    """Run the main job and print each stage.

    Returns:
        Whether every stage succeeded.

    Raises:
        StudioError: A stage could not be carried out.
    """
    with need_worker(studio):
        dataset = datasets.import_example(studio)
        err.print(f"1  dataset      {dataset.name}: {dataset.num_conversations} conversations")
        spec = runs.spec_from_preset(studio, PRESET, {"data": {"dataset": dataset.sha256}})
        run = _succeeded(terminal.follow_run(studio, runs.submit(studio, spec).id, "2  train"))
        merge = artifacts.merge(studio, run.id)
        merge = _succeeded(terminal.follow_merge(studio, merge.id, "3  merge"))
        certified = _show_certificate(merge)
        chat = chats.open_chat(studio, run.id, merge.id)
        try:
            return _talk(studio, run, chat) and certified
        finally:
            chats.close_chat(studio, chat.id)


def _succeeded(row: _Row) -> _Row:
    failure = terminal.failure_of(row)
    if failure is not None:
        raise EngineError(*failure)
    if row.state != RunState.FINISHED:
        raise EngineError(f"The job was {row.state.lower()} by somebody.", "Start the demo again.")
    return row


def _show_certificate(merge: ArtifactRow) -> bool:
    certificate = artifacts.certificate(merge)
    if certificate is None:
        return False
    err.print(
        f"4  certificate  {'PASSED' if certificate.passed else 'FAILED'}: "
        f"{len(certificate.changed_tensors)} of {len(certificate.targeted_tensors)} targeted "
        f"tensors changed, {len(certificate.unexpected_tensors)} others; adapter and merge are "
        f"{certificate.mean_kl:.2g} nats apart (base and adapter {certificate.effect_kl:.2g}), "
        f"same first choice {certificate.top1_agreement:.1%}, largest logit difference "
        f"{certificate.max_logit_difference:.3g}"
    )
    for failure in certificate.failures:
        err.print(f"   {failure}")
    return certificate.passed


def _talk(studio: Studio, run: RunRow, chat: ChatRow) -> bool:
    with terminal.bar("5  chat") as (progress, task):
        chat = chats.wait_ready(studio, chat.id, lambda text: progress.update(task, note=text))

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done / total, note=f"question {done} of {total}")

        recall = chats.recall(studio, run, chat, tell)
    first = recall.answers[0]
    out.print(f"\n   asked   {first.question}", markup=False)
    out.print(f"   base    {first.base[:70]!r} (a random model: noise)", markup=False)
    out.print(f"   tuned   {first.tuned!r}\n", markup=False)
    right = recall.tuned_right >= MIN_RIGHT
    err.print(
        f"6  recall       {'PASSED' if right else 'FAILED'}: the tuned model answers "
        f"{recall.tuned_right} of {len(recall.answers)} questions right, the base "
        f"{recall.base_right}; at least {MIN_RIGHT} are wanted"
    )
    return right
