"""The queue and the workers as HTML."""

from html import escape

from studio.domain.placement import Card
from studio.services.waiting import Machine, Overview, Waiting
from studio.ui import show

EMPTY = show.empty("No run waits", "What is launched stands here until a worker is free.")


def head(found: Overview) -> str:
    """Return how many Runs wait, and whether any is started."""
    if found.is_paused:
        return show.notice(
            "bad", "The queue is paused: no run is started.", "What runs already goes on."
        )
    if not found.waiting:
        return EMPTY
    held = sum(one.row.is_held for one in found.waiting)
    words = f"{show.counted(len(found.waiting), 'runs')} in the queue"
    return show.notice("info", f"{words}, {held} of them paused." if held else f"{words}.")


def label(place: int, one: Waiting) -> str:
    """Return a queued Run as a line of the list."""
    row = one.row
    priority = f" · priority {row.priority}" if row.priority else ""
    need = "CPU" if not row.num_gpus else show.counted(row.num_gpus, "GPUs")
    return f"{place}. run {row.id} · {row.name}\n{one.why} · {need}{priority}"


def machines(found: Overview) -> str:
    """Return the workers with their cards and what they do."""
    if not found.machines:
        return show.notice(
            "bad",
            "No worker is alive: nothing is started.",
            "`studio up` and `studio worker` start one.",
        )
    return "".join(map(_machine, found.machines))


def _machine(found: Machine) -> str:
    works = ", ".join(found.works) or "waits for work"
    if found.is_closing:
        works += "; takes no more, as it is closing"
    cards = "".join(map(_card, found.cards)) or "<li>CPU: one run at a time</li>"
    return (
        f'<div class="card worker"><div class="head"><b>{escape(found.host)}</b>'
        f"<span>{escape(works)}</span></div>"
        f"<ul>{cards}</ul><small>{escape(found.name)} · version {escape(found.version)}</small></div>"
    )


def _card(card: Card) -> str:
    words = [f"GPU {card.index}: {card.name}"]
    if card.free_gib is not None and card.total_gib is not None:
        words.append(f"{card.free_gib:.0f} of {card.total_gib:.0f} GiB free")
    words.append(card.fault or ("in use" if card.is_taken else "free"))
    return f"<li>{escape(', '.join(words))}</li>"
