"""What a training reads: its Datasets and their weights, the evaluation side, and what they share."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from studio.domain.conversation import Kind
from studio.domain.data_spec import DataSpec
from studio.domain.spec import JobSpec
from studio.domain.validation import Report
from studio.errors import InputError, disk_errors
from studio.intake.split import Overlap, split
from studio.intake.split import overlap as compare
from studio.services import datasets
from studio.services.studio import Studio
from studio.store.rows import DatasetRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A Dataset of a mixture, and how often an epoch holds each of its records."""

    row: DatasetRow
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What a training reads.

    Attributes:
        parts: The Datasets that are trained on; the first is the spec's own.
        evaluation: The Dataset that is only measured; None without.
    """

    parts: tuple[Part, ...]
    evaluation: DatasetRow | None

    def pinned(self, spec: JobSpec) -> JobSpec:
        """Return the spec with every Dataset named by its content hash."""
        mixture = tuple(
            part.model_copy(update={"dataset": found.row.sha256})
            for part, found in zip(spec.data.mixture, self.parts[1:], strict=True)
        )
        names = {
            "dataset": self.parts[0].row.sha256,
            "mixture": mixture,
            "eval_dataset": "" if self.evaluation is None else self.evaluation.sha256,
        }
        return spec.model_copy(update={"data": spec.data.model_copy(update=names)})


def for_training(studio: Studio, spec: JobSpec) -> TrainingData:
    """Find the Datasets of a spec, and see that they can be trained on together.

    Raises:
        NotFoundError: There is no such Dataset, or its file is gone.
        InputError: A Dataset is of the wrong kind, shows images, or stands in it twice.
    """
    data = spec.data
    main = Part(row=datasets.get(studio, data.dataset), weight=data.weight)
    further = [
        Part(row=datasets.get(studio, part.dataset, "data.mixture"), weight=part.weight)
        for part in data.mixture
    ]
    evaluation = None
    if data.eval_dataset:
        evaluation = datasets.get(studio, data.eval_dataset, "data.eval_dataset")
    found = TrainingData(parts=(main, *further), evaluation=evaluation)
    _check_names(found, data)
    for field, row in _fields(found):
        _check_kind(row, field)
        _check_images(studio, row, field)
    _check_share(studio, spec, main.row)
    return found


def _fields(found: TrainingData) -> Iterator[tuple[str, DatasetRow]]:
    for number, part in enumerate(found.parts):
        yield "data.mixture" if number else "data.dataset", part.row
    if found.evaluation is not None:
        yield "data.eval_dataset", found.evaluation


def _check_names(found: TrainingData, data: DataSpec) -> None:
    times = Counter(part.row.name for part in found.parts)
    for name, count in times.items():
        if count > 1:
            raise InputError(
                f"Dataset {name!r} stands {count} times in the mixture.",
                "Name it once and raise its weight instead.",
                field="data.mixture",
            )
    if found.evaluation is None:
        return
    if found.evaluation.name in times:
        raise InputError(
            f"Dataset {found.evaluation.name!r} is trained on and evaluated: its loss would only "
            "show what was learned by heart.",
            "Choose another evaluation dataset, or set an evaluation share instead.",
            field="data.eval_dataset",
        )
    if data.eval_share:
        raise InputError(
            f"An evaluation dataset is chosen, and an evaluation share of {data.eval_share:g} too.",
            "Choose one of the two.",
            field="data.eval_share",
        )


def _check_kind(row: DatasetRow, field: str) -> None:
    if row.kind == Kind.PREFERENCES:
        raise InputError(
            f"Dataset {row.name!r} holds preferences (chosen and rejected answers); this preset "
            "needs messages.",
            "Choose a dataset of conversations or of plain text.",
            field=field,
        )


def _check_images(studio: Studio, row: DatasetRow, field: str) -> None:
    count = Report.model_validate(row.report).num_with_images
    with datasets.canonical(studio.home, row) as opened:  # says when the file is gone
        first = opened.first_with_images() if count else None
    if not count:
        return
    where = "" if first is None else f" (first: {first + 1})"
    raise InputError(
        f"Dataset {row.name!r} holds images in {count} conversations{where}; this preset reads "
        "text only.",
        "Exclude them on the Datasets page and save a version.",
        field=field,
    )


def _check_share(studio: Studio, spec: JobSpec, row: DatasetRow) -> None:
    chosen = kept_out(studio, spec)
    if chosen is not None and not chosen.any():
        raise InputError(
            f"No part of {row.name!r} can be kept for evaluation: it has "
            f"{row.num_conversations} conversations, all nearly the same.",
            "Set the evaluation share to 0, or add more data.",
            field="data.eval_share",
        )


def kept_out(studio: Studio, spec: JobSpec) -> NDArray[np.bool_] | None:
    """Return which records of a spec's Dataset are measured and not trained on; None without.

    Raises:
        NotFoundError: There is no such Dataset, or its file is gone.
    """
    if not spec.data.eval_share:
        return None
    row = datasets.get(studio, spec.data.dataset)
    with datasets.canonical(studio.home, row) as opened:
        return split(np.array(opened.groups), spec.data.eval_share, spec.train.seed)


def overlaps(studio: Studio, data: TrainingData) -> dict[str, Overlap]:
    """Return what the training Datasets share with the evaluation Dataset, by name.

    Raises:
        NotFoundError: The file of a Dataset is gone.
    """
    if data.evaluation is None:
        return {}
    found = {
        part.row.name: overlap(studio, part.row.sha256, data.evaluation.sha256)
        for part in data.parts
    }
    return {name: shared for name, shared in found.items() if shared.exact or shared.near}


def overlap(studio: Studio, train_key: str, eval_key: str) -> Overlap:
    """Return which records of an evaluation Dataset a training Dataset has too.

    Raises:
        NotFoundError: There is no such Dataset, or its file is gone.
    """
    train, evaluation = datasets.get(studio, train_key), datasets.get(studio, eval_key)
    with (
        disk_errors("comparing the datasets"),
        datasets.canonical(studio.home, train) as trained,
        datasets.canonical(studio.home, evaluation) as measured,
    ):
        return compare(trained, measured, studio.home.incoming)
