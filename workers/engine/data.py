"""What a run learns from: its Datasets, tokenised, truncated, mixed, and split."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studio.disk import RunFolder
from studio.domain.conversation import Conversation, Kind
from studio.domain.data_spec import DataSpec
from studio.domain.outcome import ExitCode
from studio.domain.spec import JobSpec
from studio.errors import EngineError
from studio.intake.canonical import Canonical
from studio.intake.split import split
from studio.tokens.cache import TokenCache, build
from studio.tokens.examples import Example
from studio.tokens.fitted import Fitted
from studio.tokens.order import Part
from studio.tokens.shard import kind_of

_SHA256 = re.compile("[0-9a-f]{64}")
_FIELD = "data.max_length_tokens"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One Dataset of a run.

    Attributes:
        name: As a sentence names it, as in `the dataset`.
    """

    name: str
    path: Path
    kind: Kind
    cache: TokenCache
    fitted: Fitted
    weight: float = 1.0


class Examples:
    """The examples of several Datasets in one row, and which part of it each one is.

    Args:
        sources: The Datasets.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.parts = tuple(
            Part(num_examples=len(source.fitted), weight=source.weight) for source in sources
        )
        self.lengths: np.ndarray = np.concatenate([source.fitted.lengths for source in sources])
        self.supervised: np.ndarray = np.concatenate(
            [source.fitted.supervised for source in sources]
        )
        self._ends = np.cumsum([len(source.fitted) for source in sources])

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        """Yield all examples."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Return an example."""
        number, place = self._place(index)
        return self.sources[number].fitted[place]

    def place_of(self, index: int) -> tuple[int, int]:
        """Return which Dataset an example is of, and the number of its record, from 0."""
        number, place = self._place(index)
        return number, int(self.sources[number].fitted.lines[place])

    def name_of(self, place: tuple[int, int]) -> str:
        """Return a place as in `17`, or `17 of dataset 0f3a` where it is not the first."""
        number, line = place
        return f"{line + 1} of {self.sources[number].name}" if number else str(line + 1)

    @property
    def per_epoch(self) -> int:
        """Examples of one epoch."""
        return sum(part.per_epoch for part in self.parts)

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return number, index - first


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """All that a run reads.

    Attributes:
        evaluation: What is never trained on; None when nothing is kept out.
    """

    training: Examples
    evaluation: Examples | None


def read_data(folder: RunFolder, spec: JobSpec, tokenizer: Path, say: Say) -> RunData:
    """Tokenise every Dataset of a run, or open what is tokenised already.

    Args:
        folder: The run folder.
        spec: Its order; Datasets are named by content hash.
        tokenizer: Folder of the base model's tokenizer.
        say: Receives what is done now, as in `tokenising 42 %`.

    Raises:
        InputError: The tokenizer or its template is wrong.
        EngineError: A Dataset was changed, holds nothing to learn, or examples that are too long.
        MachineError: The disk or the memory is full.
    """
    data = spec.data
    opened = _Opener(folder, data, tokenizer, say)
    kept_out = None
    if data.eval_share:
        kept_out = _kept_out(opened.path(data.dataset), data.eval_share, spec.train.seed)
    keep = None if kept_out is None else ~kept_out
    training = [opened.source(data.dataset, "the dataset", data.weight, keep)]
    for part in data.mixture:
        training.append(opened.source(part.dataset, f"dataset {part.dataset[:12]}", part.weight))
    evaluation = []
    if data.eval_dataset:
        evaluation.append(opened.source(data.eval_dataset, "the evaluation dataset"))
    if kept_out is not None:
        evaluation.append(opened.source(data.dataset, "the dataset", keep=kept_out))
    for source in (*training, *evaluation):
        _refuse_unusable(source, data)
    return RunData(
        training=Examples(training), evaluation=Examples(evaluation) if evaluation else None
    )


class _Opener:
    def __init__(self, folder: RunFolder, data: DataSpec, tokenizer: Path, say: Say) -> None:
        self._folder, self._data, self._tokenizer, self._say = folder, data, tokenizer, say
        self._caches: dict[str, TokenCache] = {}

    def path(self, dataset: str) -> Path:
        return self._folder.dataset_of(dataset)

    def source(
        self, dataset: str, name: str, weight: float = 1.0, keep: np.ndarray | None = None
    ) -> Source:
        path = self.path(dataset)
        if dataset not in self._caches:
            self._caches[dataset] = self._cache(path, dataset, name)
        cache = self._caches[dataset]
        return Source(
            name=name,
            path=path,
            kind=_kind(path),
            cache=cache,
            fitted=Fitted(cache, self._data.cut, keep),
            weight=weight,
        )

    def _cache(self, path: Path, dataset: str, name: str) -> TokenCache:
        self._say("reading the dataset")
        sha = _checked_sha256(path, dataset, name)
        said = [-1]

        def progress(share: float) -> None:
            percent = int(100 * share)
            if percent > said[0]:
                said[0] = percent
                self._say(f"tokenising {percent} %")

        return build(
            self._folder.home,
            sha,
            self._tokenizer,
            self._data.reading,
            dataset=path,
            progress=progress,
        )


def _checked_sha256(path: Path, dataset: str, name: str) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(
            f"The file of {name} cannot be read: {error}.",
            "Add the dataset again; the same content takes its place.",
            "data.dataset",
            code=ExitCode.DATA,
        ) from error
    # A spec that was written by hand may name it otherwise, and then there is nothing to compare.
    if _SHA256.fullmatch(dataset) and dataset != found:
        raise EngineError(
            f"The file of {name} was changed since it was validated: its content hash is now "
            f"{found[:12]}..., not {dataset[:12]}...",
            "Add the file that you mean as a new dataset, and choose that.",
            "data.dataset",
            code=ExitCode.DATA,
        )
    return found


def _canonical(path: Path, kind: Kind) -> Canonical:
    file = path.resolve()
    return Canonical(file, file.with_suffix(".index.npy"), kind)


def _kept_out(path: Path, share: float, seed: int) -> np.ndarray:
    """Return which conversations of the Dataset are measured and not trained on."""
    with _canonical(path, _kind(path)) as canonical:
        kept_out = split(canonical.groups, share, seed)
    if not kept_out.any():
        raise EngineError(
            "Nothing can be kept out of training: all conversations of the dataset are nearly "
            f"equal, or there is only one ({len(kept_out)} in all).",
            "Set the evaluation share to 0, or choose an evaluation dataset.",
            "data.eval_share",
            code=ExitCode.DATA,
        )
    return kept_out


def _kind(path: Path) -> Kind:
    with path.open("rb") as file:
        return kind_of(file.readline())


def _refuse_unusable(source: Source, data: DataSpec) -> None:
    """Refuse a Dataset of which anything would be left out silently, or everything."""
    counts = source.cache.meta.counts
    if counts.num_refused:
        first = counts.refused[0]
        lines = ", ".join(str(item.number + 1) for item in counts.refused)
        more = ", ..." if counts.num_refused > len(counts.refused) else ""
        raise EngineError(
            f"The model cannot read {counts.num_refused} of {counts.num_conversations} "
            f"conversations of {source.name}: lines {lines}{more}. Line {first.number + 1}: "
            f"{first.message}",
            "Drop or correct these conversations, or choose a model whose template accepts them.",
            "data.dataset",
            code=ExitCode.DATA,
        )
    if not len(source.cache):
        raise EngineError(
            "The dataset holds no examples.", "Choose another dataset.", code=ExitCode.DATA
        )
    if data.truncation == "refuse":
        _refuse_long(source, data.max_length_tokens)
    if not source.fitted.supervised.any() and len(source.fitted.long):
        raise EngineError(
            f"0 of {counts.num_conversations} conversations of {source.name} keep a trained token "
            f"at {data.max_length_tokens} tokens; the shortest needs "
            f"{source.fitted.shortest_needed()}.",
            f"Set the longest example to {source.fitted.shortest_needed()} or more.",
            _FIELD,
            code=ExitCode.DATA,
        )


def _refuse_long(source: Source, max_length_tokens: int) -> None:
    long, cache = source.fitted.long, source.cache
    if not len(long):
        return
    longest = int(long[np.argmax(cache.lengths[long])])
    num_tokens = int(cache.lengths[longest])
    raise EngineError(
        f"{len(long)} of {len(cache)} examples are longer than {max_length_tokens} tokens; "
        f"the longest is line {int(cache.lines[longest]) + 1} of {source.name} with "
        f"{num_tokens} tokens.",
        f"Set the longest example to {num_tokens} or more, choose what happens to longer ones "
        "(cut or split), or shorten those lines.",
        _FIELD,
        code=ExitCode.DATA,
    )


def conversations_to_compare(source: Source, count: int) -> list[tuple[int, Conversation]]:
    """Return some conversations of a Dataset, evenly spread, with their numbers from 0."""
    lines = np.unique(source.fitted.lines)
    chosen = lines[np.linspace(0, len(lines) - 1, min(count, len(lines))).astype(int)]
    found = []
    with _canonical(source.path, source.kind) as canonical:
        for number in chosen.tolist():
            record = canonical[number]
            if isinstance(record, Conversation):
                found.append((number, record))
    return found
