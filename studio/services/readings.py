"""A Dataset as a model reads it: one conversation in tokens, all of it in figures, a run's epoch."""

from collections.abc import Callable
from dataclasses import dataclass

from studio.domain.data_spec import DataSpec
from studio.domain.reading import Reading
from studio.domain.spec import JobSpec, ModelRef
from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.errors import NotFoundError
from studio.intake.split import Overlap
from studio.services import datasets, mixtures, tokenizers
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from studio.tokens import cache
from studio.tokens.cache import TokenCache
from studio.tokens.fitted import Fitted
from studio.tokens.sandbox import Inspection
from studio.tokens.statistics import MixturePlan, Statistics, mixture_plan
from studio.tokens.statistics import statistics as count

Progress = Callable[[float], None]


def inspect(studio: Studio, key: str, number: int, model: ModelRef, data: DataSpec) -> Inspection:
    """Return one conversation as the trainer feeds it to a model.

    Args:
        studio: The installation.
        key: Name, number or content hash of the Dataset.
        number: Which record, from 0.
        model: Whose template and tokenizer read it.
        data: Its thinking, truncation and cutoff are applied.

    Raises:
        NotFoundError: There is no such Dataset, record or model.
        InputError: The template refuses the conversation; its words are kept.
    """
    row = datasets.get(studio, key)
    found = datasets.records(studio.home, row, number, 1)
    if not found:
        raise NotFoundError(
            f"There is no record {number + 1} in {row.name}: they go from 1 to "
            f"{row.num_conversations:,}.",
            "Choose another number.",
        )
    folder = tokenizers.folder_of(studio, model)
    return studio.inspector.inspect(found[0], folder, data.reading, data.cut)


def tokens_of(
    studio: Studio, row: DatasetRow, model: ModelRef, reading: Reading, progress: Progress
) -> TokenCache:
    """Return the token cache of a Dataset; make it where it is not there yet.

    Raises:
        InputError: The model or its template is wrong.
        MachineError: The disk or the memory is full.
    """
    folder = tokenizers.folder_of(studio, model)
    return cache.build(studio.home, row.sha256, folder, reading, progress=progress)


def statistics(
    studio: Studio, key: str, model: ModelRef, data: DataSpec, *, progress: Progress
) -> Statistics:
    """Count a Dataset in a model's own tokens; steps are those of a spec's defaults.

    Raises:
        NotFoundError: There is no such Dataset or model.
        InputError: The model's template is wrong.
        MachineError: The disk or the memory is full.
    """
    row = datasets.get(studio, key)
    found = tokens_of(studio, row, model, data.reading, progress)
    return count(found, data.cut, BatchSpec(), TrainSpec())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run would train on.

    Attributes:
        num_too_long: Examples that are longer than the cutoff.
        lost_tokens: Tokens that truncation takes away.
        num_nothing_left: Conversations of which truncation leaves nothing to learn.
        num_refused: Conversations that the template refuses.
        num_kept_out: Conversations of the Dataset that are measured and not trained on.
        overlaps: Training Datasets that share records with the evaluation Dataset, by name.
    """

    mixture: MixturePlan
    num_too_long: int
    lost_tokens: int
    num_nothing_left: int
    num_refused: int
    longest: int
    num_kept_out: int
    overlaps: dict[str, Overlap]


def plan(studio: Studio, spec: JobSpec, progress: Progress) -> Plan:
    """Return what a run of this spec would train on, counted on the real tokens.

    Raises:
        NotFoundError: There is no such Dataset or model.
        InputError: A Dataset cannot be trained on, or the template is wrong.
    """
    found = mixtures.for_training(studio, spec)
    kept_out = mixtures.kept_out(studio, spec)
    fitted: dict[str, tuple[Fitted, float]] = {}
    num_refused = longest = 0
    for index, part in enumerate(found.parts):
        step = _share(progress, index, len(found.parts))
        tokens = tokens_of(studio, part.row, spec.model, spec.data.reading, step)
        trained = ~kept_out if index == 0 and kept_out is not None else None
        fitted[part.row.name] = (Fitted(tokens, spec.data.cut, trained), part.weight)
        num_refused += tokens.meta.counts.num_refused
        longest = max(longest, int(tokens.lengths.max(initial=0)))
    all_fitted = [each for each, _ in fitted.values()]
    return Plan(
        mixture=mixture_plan(fitted, spec.batch, spec.train, spec.data.max_length_tokens),
        num_too_long=sum(len(each.long) for each in all_fitted),
        lost_tokens=sum(each.lost_tokens for each in all_fitted),
        num_nothing_left=sum(len(each.nothing_left()) for each in all_fitted),
        num_refused=num_refused,
        longest=longest,
        num_kept_out=0 if kept_out is None else int(kept_out.sum()),
        overlaps=mixtures.overlaps(studio, found),
    )


def _share(progress: Progress, index: int, total: int) -> Progress:
    return lambda done: progress((index + done) / total)
