"""What was found in a file, as HTML. Every text that a file holds is escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from studio.domain.conversation import Kind
from studio.domain.validation import Issue, Report
from studio.store.rows import DatasetRow
from studio.ui.show import ago, count, counted, facts, notice, size

MAX_SHOWN_ISSUES = 20
NOUNS = {
    Kind.CONVERSATIONS: "conversations",
    Kind.PREFERENCES: "preference pairs",
    Kind.TEXTS: "texts",
}
_GAP = '<div style="height:10px"></div>'


def welcome(row: DatasetRow, *, is_new: bool) -> str:
    """Return the banner of a file that became a Dataset, or was one already."""
    what = counted(row.num_conversations, NOUNS[Kind(row.kind)])
    if not is_new:
        return notice("info", f"The same content is there already, as {row.name}: {what}.")
    found = Report.model_validate(row.report)
    dropped = f", {count(found.num_rejected)} dropped" if found.num_rejected else ""
    warned = f"; {counted(found.num_warnings, 'warnings')}" if found.num_warnings else ""
    return notice(
        "good",
        f"{row.name} is ready: {what}{dropped}{warned}.",
        "Look at it on the right, or go on to Train.",
    )


def rejected(name: str, found: Report, behind: Sequence[str] = ()) -> str:
    """Return why a file was not stored, and what can be done about it.

    Args:
        name: The file.
        found: Its Report.
        behind: Files with faults that are shown after it.
    """
    later = f" After it: {', '.join(behind)}." if behind else ""
    if found.columns:
        return notice(
            "info",
            f"{name} is a table with {len(found.columns)} columns that no known format has.",
            f"Say below which column holds what; nothing is stored before.{later}",
        )
    errors, lines = counted(found.num_errors, "errors"), counted(found.num_lines, "lines")
    head = (
        f"{name} was not stored: {errors} in {lines}."
        if found.num_lines
        else f"{name} was not stored."
    )
    hint = "Correct what stands below and add it again."
    if found.is_salvageable:
        hint = (
            f"Good: {counted(found.num_conversations, NOUNS[found.kind])}. Keep them and drop the "
            "others, or correct the file and add it again."
        )
    return notice("bad", head, hint + later) + counts(found.counts) + issues(found)


def report(row: DatasetRow, found: Report) -> str:
    """Return what was recognised in a Dataset."""
    noun = NOUNS[found.kind]
    all_ = found.num_conversations + found.num_rejected
    thinking = f"{count(found.num_with_reasoning)} of {count(found.num_conversations)}"
    if found.num_empty_think:
        thinking += f", {count(found.num_empty_think)} empty"
    cells = [
        (noun, count(found.num_conversations)),
        ("messages", count(found.num_messages)),
        ("with several questions", count(found.num_multi_turn)),
        ("with a system message", count(found.num_with_system)),
        (
            "with thinking",
            thinking if found.num_with_reasoning or found.num_empty_think else "none",
        ),
        ("with tool calls", count(found.num_with_tools) if found.num_with_tools else "none"),
        ("with images", count(found.num_with_images) if found.num_with_images else "none"),
        ("stored", size(row.size_bytes)),
        ("content hash", row.sha256[:8]),
    ]
    head = (
        f"Recognised as {found.format}: {count(found.num_conversations)} of {count(all_)} records."
    )
    return (
        notice("good", head, _where_from(row))
        + _verdict(found)
        + _GAP
        + facts(cells)
        + counts(found.counts)
        + issues(found)
    )


def _verdict(found: Report) -> str:
    """Say what keeps a Dataset from being trained on, before a run does."""
    if found.kind is Kind.PREFERENCES:
        return notice(
            "bad",
            "These are preference pairs: no preset trains on them yet.",
            "They are kept and can be looked at; training needs conversations or texts.",
        )
    if found.num_with_images:
        return notice(
            "bad",
            f"{counted(found.num_with_images, 'conversations')} with images: the presets read text "
            "only, and a run refuses them.",
            "Exclude them under Record by record, and save a version.",
        )
    return ""


def _where_from(row: DatasetRow) -> str:
    source = row.source
    if source.get("type") == "version":
        changed = ", ".join(f"{n:,} {what}" for what, n in (row.change or {}).items() if n)
        return f"a version of {source['name']} ({changed}), saved {ago(row.created_at)}"
    words = f"from {row.source_name}"
    if source.get("revision"):
        words += f" at {source['revision'][:12]}"
    if source.get("sha256"):
        words += f" (sha256 {source['sha256'][:12]}…)"
    return f"{words}, added {ago(row.created_at)}"


def counts(found: Mapping[str, int]) -> str:
    """Return how many findings there are of each kind."""
    if not found:
        return ""
    chips = "".join(
        f'<span class="count"><b>{count(number)}</b> {escape(kind.replace("_", " "))}</span>'
        for kind, number in sorted(found.items(), key=lambda item: -item[1])
    )
    return f'<div class="counts">{chips}</div>'


def issues(found: Report) -> str:
    """Return the first findings of a Report as a table; empty without findings."""
    if not found.issues:
        return ""
    shown = sorted(found.issues, key=lambda issue: issue.severity != "error")[:MAX_SHOWN_ISSUES]
    rows = "".join(_issue_row(issue) for issue in shown)
    more = sum(found.counts.values()) - len(shown)
    tail = f"<p>and {count(more)} more findings</p>" if more > 0 else ""
    return (
        '<div class="scroll"><table class="findings"><tr><th>line</th><th>where</th><th>what</th>'
        f"<th>found</th></tr>{rows}</table></div>{tail}"
    )


def _issue_row(issue: Issue) -> str:
    line = str(issue.line) if issue.line else "file"
    file = f"<br><small>{escape(issue.file)}</small>" if issue.file else ""
    return (
        f'<tr class="{issue.severity}"><td>{line}{file}</td>'
        f"<td><code class='path'>{escape(issue.path)}</code></td>"
        f"<td>{escape(issue.reason)}</td><td><code class='path'>{escape(issue.value)}</code></td>"
        "</tr>"
    )
