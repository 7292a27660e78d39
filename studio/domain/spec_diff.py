"""What is different between two JobSpecs, field by field."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from studio.domain.data_spec import mixture_to_text
from studio.domain.section import Section
from studio.domain.spec import JobSpec

_MIXTURE = "data.mixture"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One field that is different.

    Attributes:
        title: Its name on the page.
        key: Where it stands, as in `optim.learning_rate`.
        old: Its value in words.
        new: Likewise.
    """

    title: str
    key: str
    old: str
    new: str


def diff(before: JobSpec, after: JobSpec) -> list[Change]:
    """Return every field that is different, in the order of the spec."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    found = []
    for path, title in _leaves(JobSpec):
        there, here = _at(old, path), _at(new, path)
        if there != here:
            key = ".".join(path)
            change = Change(title=title, key=key, old=_words(key, there), new=_words(key, here))
            found.append(change)
    return found


def _leaves(section: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _leaves(kind, (*above, name))
        else:
            yield (*above, name), field.title or name


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name]
    return values


def _words(key: str, value: Any) -> str:
    if key == _MIXTURE:
        value = mixture_to_text(value)
    if isinstance(value, list | tuple):
        value = ", ".join(str(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "empty" if value is None or value == "" else str(value)
