"""The target tree of a model as HTML: groups with their counts, layers folded into them."""

from collections.abc import Sequence
from html import escape

from studio.domain.target_tree import GroupBranch, Leaf, NotTrained, TargetTree
from studio.ui.show import count, counted, facts, size

_GREY = 'style="color:var(--body-text-color-subdued)"'


def targets(found: TargetTree) -> str:
    """Return what a LoRA trains in a model, and what it leaves as it is."""
    rows = "".join(_group(branch) for branch in found.groups)
    rows += "".join(_not_trained(part) for part in found.not_trained)
    share = found.selected_parameters / found.weights
    return (
        facts(
            [
                ("trained layers", count(found.selected_modules)),
                ("trainable parameters", count(found.selected_parameters)),
                ("of the weights in all layers", f"{share:.2%}"),
                ("adapter, in 32 bits", size(found.adapter_bytes)),
            ]
        )
        + '<div class="scroll"><table class="findings targets"><thead><tr>'
        '<th scope="col">Layers trained</th><th scope="col">Trainable parameters</th>'
        f'<th scope="col">Adapter</th></tr></thead>{rows}</table></div>'
    )


def _group(branch: GroupBranch) -> str:
    style = "" if branch.selected_modules else f" {_GREY}"
    trained = f"{count(branch.selected_modules)} of {count(branch.modules)}"
    note = f"<div {_GREY}>{escape(branch.note)}</div>" if branch.note else ""
    if branch.selected_modules:
        parameters, adapter = count(branch.selected_parameters), size(branch.adapter_bytes)
    else:
        parameters, adapter = f"{count(branch.parameters)} if chosen", ""
    return (
        f'<tbody><tr{style}><th scope="rowgroup" colspan="3"><details>'
        f"<summary>{escape(branch.title)}</summary>{_leaves(branch)}</details>{note}</th></tr>"
        f"<tr{style}><td>{trained}</td><td>{parameters}</td><td>{adapter}</td></tr></tbody>"
    )


def _leaves(branch: GroupBranch) -> str:
    layers: dict[Leaf, list[int]] = {}
    for part in branch.layers:
        for leaf in part.leaves:
            layers.setdefault(leaf, []).extend([] if part.layer is None else [part.layer])
    return "<ul>" + "".join(_leaf(leaf, found) for leaf, found in layers.items()) + "</ul>"


def _leaf(leaf: Leaf, layers: Sequence[int]) -> str:
    where = f" in {counted(len(layers), 'layers')} ({ranges(layers)})" if layers else ""
    what = f"{count(leaf.parameters)} at rank {leaf.rank}" if leaf.is_selected else "not chosen"
    return f"<li><code>{escape(leaf.name)}</code>{where}: {what}</li>"


def _not_trained(part: NotTrained) -> str:
    return (
        f'<tbody><tr {_GREY}><th scope="rowgroup" colspan="3">{escape(part.title)}'
        f"<div>{escape(part.reason)}</div></th></tr></tbody>"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with neighbours joined, as in `0-2, 4-6, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
