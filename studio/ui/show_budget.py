"""A memory budget as HTML: one stacked bar against the card, and a table that says the same."""

from html import escape

from studio.domain.budget import Budget, Part
from studio.services.budgets import Estimate, verdict
from studio.ui.show import notice, size

# Middle tones, told apart on white and on black; the table names each beside its colour.
COLOURS = {
    "weights": "#64748b",
    "adapter": "#0d9488",
    "gradients": "#0284c7",
    "optimizer": "#7c3aed",
    "activations": "#d97706",
    "layer": "#db2777",
    "loss": "#dc2626",
    "workspace": "#65a30d",
    "gathered": "#0891b2",
    "context": "#a1a1aa",
}
_BAR = (
    "display:flex;position:relative;height:26px;border-radius:6px;overflow:hidden;"
    "border:1px solid var(--border-color-primary);background:var(--background-fill-secondary)"
)
_EDGE = "position:absolute;top:0;bottom:0;width:0;border-left:2px dashed var(--body-text-color);"


def estimate(found: Estimate | None) -> str:
    """Return what a run needs of each card, whether that fits, and what is recomputed."""
    if found is None:
        return notice(
            "info",
            "The memory of this model is not known yet.",
            "Its config.json is read when the model is downloaded.",
        )
    kind = {True: "good", False: "bad", None: "info"}[found.fits]
    words = [found.hint, found.reason]
    if found.card is not None:
        words.append(f"Compared with {found.card.title}.")
    budget = found.budget
    small = " ".join(word for word in words if word)
    return notice(kind, verdict(found), small) + _chart(found) + _table(budget)


def _chart(found: Estimate) -> str:
    budget = found.budget
    card_bytes = found.card.memory_bytes if found.card is not None else 0
    whole = max(budget.total_bytes, card_bytes, 1)
    bars = "".join(_bar(part, whole) for part in budget.parts)
    edge = ""
    if 0 < card_bytes < whole:
        left = 100 * card_bytes / whole
        edge = f'<i style="{_EDGE}left:{left:.2f}%" title="the card: {size(card_bytes)}"></i>'
    title = "Memory of each card" if budget.cards else "Memory"
    against = f" of {size(card_bytes)}" if card_bytes else ""
    label = f"{title}: {size(budget.total_bytes)}{against}"
    return (
        f'<div class="charttitle">{escape(label)}</div>'
        f'<div style="{_BAR}" role="img" aria-label="{escape(_in_words(budget), quote=True)}">'
        f"{bars}{edge}</div>"
    )


def _bar(part: Part, whole: int) -> str:
    width = 100 * part.num_bytes / whole
    title = escape(f"{part.title}: {size(part.num_bytes)}", quote=True)
    return f'<i style="width:{width:.2f}%;background:{COLOURS[part.name]}" title="{title}"></i>'


def _in_words(budget: Budget) -> str:
    parts = ", ".join(f"{part.title} {size(part.num_bytes)}" for part in budget.parts)
    return f"{parts}; {size(budget.total_bytes)} in all"


def _table(budget: Budget) -> str:
    rows = "".join(_row(part, budget.total_bytes) for part in budget.parts)
    worst = "while the loss is computed"
    if budget.moment != "loss":
        worst = f"in the backward pass of {budget.moment}"
    return (
        "<details><summary>Part by part</summary>"
        '<div class="scroll"><table class="findings"><thead><tr><th scope="col">Part</th>'
        '<th scope="col">Memory</th><th scope="col">Share</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"<p>{escape(f'Predicted for the moment that holds most: {worst}; {budget.plan}.')}</p></details>"
    )


def _row(part: Part, total_bytes: int) -> str:
    swatch = (
        f'<i aria-hidden="true" style="display:inline-block;width:11px;height:11px;'
        f'border-radius:3px;margin-right:7px;background:{COLOURS[part.name]}"></i>'
    )
    share = part.num_bytes / max(1, total_bytes)
    return (
        f"<tr><td>{swatch}{escape(part.title)}</td><td>{size(part.num_bytes)}</td>"
        f"<td>{share:.0%}</td></tr>"
    )
