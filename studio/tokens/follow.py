"""Chat templates whose course can be followed: checked construct by construct, run on Traced texts.

A construct that is not named here could look into a text without being seen; a template that has
one is not followed.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from studio.domain.chat_template import make_environment, tojson
from studio.tokens.trace import NotSeparable
from studio.tokens.traced import Opaque, Safe, Traced, concat

# Nodes that do nothing with a text but write it, join it, or ask what Traced texts answer for.
_NODES = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.Assign,
    nodes.Macro,
    nodes.Name,
    nodes.NSRef,
    nodes.Const,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.Add,
    nodes.Sub,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.CondExpr,
    nodes.List,
    nodes.Tuple,
    nodes.Operand,
    nodes.Keyword,
    nodes.Continue,
    nodes.Break,
    nodes.Neg,
    nodes.Concat,
)
_FILTERS = {"trim", "length", "count", "tojson", "items", "string", "safe", "first", "last"}
_METHODS = {"startswith", "endswith", "strip", "lstrip", "rstrip", "split"}
_FUNCTIONS = {"namespace", "raise_exception"}
# Answers of tests of a Traced text, which all depend on its type alone.
_TEXT_TESTS = {
    "string": True,
    "mapping": False,
    "sequence": True,
    "iterable": True,
    "defined": True,
    "undefined": False,
    "none": False,
    "true": False,
    "false": False,
    "boolean": False,
    "number": False,
}
_IS_THERE = {"defined": True, "undefined": False}


@lru_cache(maxsize=16)
def why_not_followed(template: str) -> str:
    """Return which construct of a template could look into a text unseen, empty where none."""
    try:
        tree = _environment().parse(template)
    except TemplateError as error:
        return f"the template is not valid: {error}"
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    for node in _walk(tree):
        if not _is_followed(node, macros):
            return f"line {node.lineno} of the template: {type(node).__name__} is not followed."
    return ""


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _is_followed(node: nodes.Node, macros: set[str]) -> bool:
    match node:
        case nodes.Filter(name=name):
            return name in _FILTERS and _are_constant(node)
        case nodes.Test(name=name):
            return name in _TEXT_TESTS and _are_constant(node)
        case nodes.Call(node=nodes.Name(name=name)):
            return name in _FUNCTIONS | macros and node.dyn_args is node.dyn_kwargs is None
        case nodes.Call(node=nodes.Getattr(attr=name)):
            return name in _METHODS and _are_constant(node)
        case nodes.Compare(expr=left, ops=operands):
            return isinstance(left, nodes.Const) or not any("in" in o.op for o in operands)
    return isinstance(node, _NODES)


def _are_constant(node: Any) -> bool:
    given = [*node.args, *(keyword.value for keyword in node.kwargs)]
    is_plain = node.dyn_args is None and node.dyn_kwargs is None
    return is_plain and all(isinstance(value, nodes.Const) for value in given)


class _Environment(ImmutableSandboxedEnvironment):
    concat = staticmethod(concat)


class _Joins(NodeTransformer):
    """Writes `a ~ b` as additions: the function behind it copies texts unseen."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        parts = [
            nodes.Filter(self.visit(part), "string", [], [], None, None, lineno=node.lineno)
            for part in node.nodes
        ]
        joined: nodes.Expr = parts[0]
        for part in parts[1:]:
            joined = nodes.Add(joined, part, lineno=node.lineno)
        return joined


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = make_environment(_Environment)
    filters, tests = environment.filters, environment.tests
    filters["tojson"] = _tojson
    filters["safe"], filters["items"] = _safe(filters["safe"]), _items(filters["items"])
    for name in _TEXT_TESTS:
        tests[name] = _test(name, cast("Callable[[Any], bool]", tests[name]))
    return environment


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    """Return a template that takes Traced texts and writes one."""
    environment = _environment()
    tree = _Joins().visit(environment.parse(template))
    code = environment.compile(tree)
    return Template.from_code(environment, code, environment.make_globals(None))


def _test(name: str, plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def test(value: Any) -> bool:
        if isinstance(value, Traced):
            return _TEXT_TESTS[name]
        if isinstance(value, Opaque):
            return _IS_THERE[name] if name in _IS_THERE else bool(value.ask(name, plain))
        return plain(value)

    return test


def _items(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def items(value: Any) -> Any:
        return value.items() if isinstance(value, Opaque) else plain(value)

    return items


def _safe(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def safe(value: Any) -> Any:
        return Safe(value.trace, value.pieces) if isinstance(value, Traced) else plain(value)

    return safe


def _tojson(value: Any, **options: Any) -> str:
    if isinstance(value, Opaque):
        return value.make("tojson", partial(tojson, **options), *sorted(options.items()))
    for inner in _inside(value):
        if isinstance(inner, Traced | Opaque):
            raise NotSeparable("a text inside of JSON")
    return tojson(value, **options)


def _inside(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _inside(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inside(inner)
