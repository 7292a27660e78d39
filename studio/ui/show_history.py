"""What happened to a Run, where it comes from, and how two specs differ, as HTML."""

from collections.abc import Sequence
from html import escape

from studio.domain.fork import KEEP_WORDS, Keep
from studio.domain.moment import moment_words
from studio.domain.spec_diff import Change
from studio.services.forks import Lineage
from studio.store.rows import EventRow, RunRow
from studio.ui import show

# Kinds of events as workers and engine write them.
FAULTS = frozenset({"worker lost", "crashed", "failed", "passed over", "left over"})
_GOES_ON = frozenset({"worker lost", "crashed", "interrupted"})
_BY_USER = frozenset({"queued", "resumed", "forked"})
_WORDS = {"finished": "It finished.", "stopped": "It stopped.", "failed": "It failed."}
MAX_SHOWN = 200


def last_fault(events: Sequence[EventRow]) -> int:
    """Return the number of the last event that was a fault; 0 when there was none."""
    return max((event.seq for event in events if event.kind in FAULTS), default=0)


def ends_with_fault(events: Sequence[EventRow]) -> bool:
    """Tell whether a fault is the last that happened."""
    return bool(events) and events[-1].kind in FAULTS


def history(events: Sequence[EventRow]) -> str:
    """Return what happened, newest first."""
    if not events:
        return show.notice("info", "Nothing has been written down yet.")
    shown = list(reversed(events))[:MAX_SHOWN]
    left = len(events) - len(shown)
    more = f"<p>{show.counted(left, 'older events')} not shown.</p>" if left else ""
    items = "".join(map(_event, shown))
    return f'<ol class="history" tabindex="0" aria-label="what happened">{items}</ol>{more}'


def _event(event: EventRow) -> str:
    kind = ' class="fault"' if event.kind in FAULTS else ""
    text = event.text or _WORDS.get(event.kind, event.kind)
    return f"<li{kind}><time>{moment_words(event.at)}</time><span>{escape(text)}</span></li>"


def recovery(events: Sequence[EventRow]) -> str:
    """Return a banner when the studio itself went on behind a fault; empty when it did not.

    What was before the user last set the Run going is over.
    """
    began = max((event.seq for event in events if event.kind in _BY_USER), default=0)
    since = [event for event in events if event.seq >= began]
    faults = [event for event in since if event.kind in _GOES_ON]
    if not faults:
        return ""
    last = faults[-1]
    after = [event for event in since if event.seq > last.seq and event.kind == "began"]
    small = f"{moment_words(after[0].at)}: {after[0].text}" if after else ""
    return show.notice("info", f"{moment_words(last.at)}: {last.text}", small)


def lineage(row: RunRow, found: Lineage) -> str:
    """Return where a Run comes from and what was forked from it; empty for one that stands alone."""
    lines = []
    if row.parent_id is not None:
        keep = KEEP_WORDS[Keep(row.parent_keep)]
        line = f"Forked from {_link(row.parent_id)} at step {row.parent_step}: {escape(keep)}."
        further = [parent.parent_id for parent in found.parents if parent.parent_id is not None]
        if further:
            line += f" That came from {', which came from '.join(map(_link, further))}."
        lines.append(line)
    if found.children:
        forks = ", ".join(
            f"{_link(child.id)} (step {child.parent_step})" for child in found.children
        )
        lines.append(f"Forked from it: {forks}.")
    return f'<div class="lineage">{"<br>".join(lines)}</div>' if lines else ""


def _link(run_id: int) -> str:
    return f'<a href="?tab=runs&amp;run={run_id}">run {run_id}</a>'


def differences(found: Sequence[Change]) -> str:
    """Return what is different between two specs as a table."""
    if not found:
        return "<p>Nothing is different yet.</p>"
    rows = "".join(
        f'<tr><td title="{escape(change.key, quote=True)}">{escape(change.title)}</td>'
        f"<td><del>{escape(change.old)}</del></td><td><ins>{escape(change.new)}</ins></td></tr>"
        for change in found
    )
    return (
        '<div class="scroll"><table class="findings diff"><tr><th>different</th><th>was</th>'
        f"<th>now</th></tr>{rows}</table></div>"
    )
