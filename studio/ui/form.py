"""The Train form, generated from JobSpec: one component for each leaf, in the order of the spec.

Values go in by position and a nested JobSpec comes out, so that a field that is added to the spec
appears on the page by itself.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from pydantic.fields import FieldInfo

from studio.domain.data_spec import mixture_to_text
from studio.domain.preset import merge_values
from studio.domain.section import Section
from studio.domain.spec import JobSpec, parse_spec

Path = tuple[str, ...]
HIDDEN: frozenset[Path] = frozenset({("version",)})
MIXTURE: Path = ("data", "mixture")
# What stands between the texts of a field that holds several; JobSpec takes them apart again.
BETWEEN: dict[Path, str] = {("lora", "modules"): ", ", ("eval", "prompts"): "\n"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One field of the spec that holds a value.

    Attributes:
        path: Where it stands, as in ("lora", "rank").
        kind: Its type without None.
        is_optional: Whether None is a value.
    """

    path: Path
    field: FieldInfo
    kind: Any
    is_optional: bool

    @property
    def key(self) -> str:
        """Path as one word, as in `lora.rank`."""
        return ".".join(self.path)

    @property
    def title(self) -> str:
        """Name on the page."""
        return self.field.title or self.path[-1]


def leaves(section: type[Section] = JobSpec, above: Path = ()) -> list[Leaf]:
    """Return every leaf of the spec, in its order."""
    found: list[Leaf] = []
    for name, field in section.model_fields.items():
        path = (*above, name)
        kind, is_optional = _without_none(field.annotation)
        if isinstance(kind, type) and issubclass(kind, Section):
            found.extend(leaves(kind, path))
        elif path not in HIDDEN:
            found.append(Leaf(path=path, field=field, kind=kind, is_optional=is_optional))
    return found


def section_title(name: str) -> str:
    """Return the title of a section of the spec."""
    return JobSpec.model_fields[name].title or name


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(annotation))
    return annotation, False


def component(leaf: Leaf) -> gr.components.Component:
    """Create the component that fits a leaf's type."""
    common: dict[str, Any] = {
        "label": leaf.title,
        "info": leaf.field.description,
        "elem_id": f"field-{leaf.key.replace('.', '-')}",
        "min_width": 200,
    }
    if get_origin(leaf.kind) is Literal:
        return gr.Dropdown(choices=list(get_args(leaf.kind)), **common)
    if leaf.kind is bool:
        # In a row it does not keep its least width by itself: page.css does that.
        return gr.Checkbox(elem_classes="tick", **common)
    if is_groups(leaf):
        return gr.CheckboxGroup(choices=[group.value for group in _enum_of(leaf)], **common)
    if "\n" in BETWEEN.get(leaf.path, ""):
        return gr.Textbox(lines=2, max_lines=8, **common)
    # Numbers are typed as text: "2e-4" is how the field writes them, and what cannot be read as
    # a number is answered with a sentence instead of being dropped by the browser.
    return gr.Textbox(max_lines=1, **common)


def is_groups(leaf: Leaf) -> bool:
    """Whether a leaf holds several values of an enumeration."""
    return get_origin(leaf.kind) is tuple and issubclass(get_args(leaf.kind)[0], StrEnum)


def _enum_of(leaf: Leaf) -> type[StrEnum]:
    kind: type[StrEnum] = get_args(leaf.kind)[0]
    return kind


def to_values(spec: JobSpec, found: Sequence[Leaf]) -> list[Any]:
    """Return what the components of a form show for a spec."""
    dumped = spec.model_dump(mode="json")
    shown = []
    for leaf in found:
        value: Any = dumped
        for part in leaf.path:
            value = value[part]
        shown.append(_to_component(leaf, value))
    return shown


def _to_component(leaf: Leaf, value: Any) -> Any:
    if leaf.kind in (int, float):
        return "" if value is None else repr(value).removesuffix(".0")
    if leaf.path == MIXTURE:
        return mixture_to_text(value)
    if leaf.path in BETWEEN:
        return BETWEEN[leaf.path].join(value)
    return "" if value is None else value


def to_spec(values: Sequence[Any], found: Sequence[Leaf]) -> JobSpec:
    """Return the spec that a form shows.

    Args:
        values: Values of the components, in the order of `found`.
        found: The leaves.

    Raises:
        InputError: One or more fields are wrong; all of them are named.
    """
    nested: dict[str, Any] = {}
    for leaf, value in zip(found, values, strict=True):
        part: Any = _from_component(leaf, value)
        for name in reversed(leaf.path):
            part = {name: part}
        nested = merge_values(nested, part)
    return parse_spec(nested)


def _from_component(leaf: Leaf, value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip()
    # None is what Gradio sends for an empty text box or list.
    if value is None and (leaf.kind is str or leaf.path == MIXTURE or leaf.path in BETWEEN):
        value = ""
    return None if leaf.is_optional and value == "" else value
