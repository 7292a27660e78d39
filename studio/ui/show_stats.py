"""Statistics in a model's own tokens, as HTML."""

from html import escape

from studio.domain.data_spec import DataSpec
from studio.domain.train_spec import BatchSpec
from studio.services.readings import Plan
from studio.tokens.statistics import Lengths, MixturePlan, Statistics
from studio.ui.show import count, facts, notice

WIDTH, HEIGHT, FOOT = 640, 150, 20
# Of a spec that says nothing else: what the figures of a Dataset alone are counted with.
STEP_EXAMPLES = BatchSpec().micro_batch_size * BatchSpec().gradient_accumulation_steps
_GAP = '<div style="height:10px"></div>'


def statistics(found: Statistics, model: str) -> str:
    """Return everything that was counted: lengths against the cutoff first."""
    cells = [
        ("tokens", count(found.tokens)),
        ("trained on", f"{found.share_supervised:.0%}"),
        ("examples", count(found.examples)),
        ("shortest · median · longest", _lengths(found.lengths)),
        ("tokens an epoch, after the cut", count(found.epoch.tokens)),
        (f"steps an epoch, {STEP_EXAMPLES} examples each", count(found.epoch.steps)),
        ("real tokens in padded batches", f"{found.epoch.efficiency:.0%}"),
        (
            f"real tokens packed into {count(found.packing.length_tokens)}",
            f"{found.packing.efficiency:.0%}",
        ),
        ("conversations with thinking", _thinking(found)),
    ]
    head = f"{count(found.conversations)} conversations as {model} reads them"
    speed = (
        "with the fast tokenizer, which passed its test against the reference"
        if found.is_fast
        else ""
    )
    if not found.is_fast:
        speed = f"with the reference tokenizer: {found.why_slow}"
    return (
        notice("info", f"{head}: {count(found.tokens)} tokens.", speed)
        + _refused(found)
        + _cut(found)
        + _GAP
        + histogram(found.lengths, found.cut.max_length_tokens)
        + _GAP
        + facts(cells)
        + _tables(found)
    )


def _lengths(lengths: Lengths) -> str:
    return " · ".join(count(n) for n in (lengths.shortest, lengths.median, lengths.longest))


def _thinking(found: Statistics) -> str:
    thinking = found.thinking
    words = count(thinking.conversations)
    if thinking.empty:
        words += f", {count(thinking.empty)} empty"
    if thinking.left_out:
        words += f", {count(thinking.left_out)} not written by this template"
    return words if thinking.conversations or thinking.empty else "none"


def _refused(found: Statistics) -> str:
    if not found.num_refused:
        return ""
    first = found.refused[0]
    return notice(
        "bad",
        f"{count(found.num_refused)} conversations cannot be trained on with this model; "
        f"a run refuses to start with them. The first is {first.number + 1}: {first.message}",
        "Exclude or correct them under Conversations, and save a new version.",
    )


def _cut(found: Statistics) -> str:
    cut = found.cut
    if not cut.examples or cut.max_length_tokens is None:
        longest = count(found.lengths.longest)
        return notice("good", f"Nothing is cut: the longest example has {longest} tokens.")
    share = cut.lost_tokens / max(1, found.tokens)
    head = (
        f"{count(cut.conversations)} of {count(found.conversations)} conversations are longer than "
        f"{count(cut.max_length_tokens)} tokens"
    )
    if cut.policy == "refuse":
        return notice(
            "bad",
            f"{head}; a run with this cutoff refuses to start.",
            f"Raise it to {count(found.lengths.longest)}, or let whole turns be cut or split.",
        )
    words = f"{head}; {count(cut.lost_tokens)} tokens ({share:.1%}) are lost."
    small = ""
    if cut.num_nothing_left:
        numbers = ", ".join(count(number) for number in cut.nothing_left[:8])
        more = " …" if cut.num_nothing_left > 8 else ""
        small = (
            f"{count(cut.num_nothing_left)} keep nothing that could be learned: {numbers}{more}."
        )
        if cut.shortest_needed is not None:
            small += f" The first of them would need {count(cut.shortest_needed)} tokens."
    return notice("bad" if cut.num_nothing_left else "info", words, small)


def histogram(lengths: Lengths, cutoff: int | None) -> str:
    """Return the lengths as bars, with the cutoff as a line; every bar says its figures."""
    if not lengths.bins:
        return ""
    highest = max(found.examples for found in lengths.bins)
    width = WIDTH / len(lengths.bins)
    bars = []
    for number, found in enumerate(lengths.bins):
        if not found.examples:
            continue
        tall = found.examples / highest * (HEIGHT - 4)
        is_long = cutoff is not None and found.first >= cutoff
        words = f"{count(found.first)} to {count(found.end - 1)} tokens: {count(found.examples)}"
        bars.append(
            f'<rect x="{number * width + 0.5:.1f}" y="{HEIGHT - tall:.1f}" '
            f'width="{max(width - 1, 0.5):.1f}" height="{tall:.1f}" '
            f'class="{"long" if is_long else "bar"}"><title>{words}</title></rect>'
        )
    size = lengths.bins[0].end - lengths.bins[0].first
    line = _cutoff_line(cutoff, size, len(lengths.bins)) if cutoff is not None else ""
    last = count(lengths.bins[-1].end - 1)
    return (
        '<div class="charttitle">Length of the examples in tokens</div>'
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" '
        f'aria-label="histogram of {len(lengths.bins)} ranges of lengths">{"".join(bars)}{line}'
        f'<text x="0" y="{HEIGHT + 15}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{last}</text></svg>'
    )


def _cutoff_line(cutoff: int, size: int, num_bins: int) -> str:
    at = cutoff / size * WIDTH / num_bins
    if at > WIDTH:
        return ""
    anchor = "end" if at > WIDTH * 0.7 else "start"
    beside = at - 5 if anchor == "end" else at + 5
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}" class="cutoff"/>'
        f'<text x="{beside:.1f}" y="12" text-anchor="{anchor}">cutoff {count(cutoff)}</text>'
    )


def _tables(found: Statistics) -> str:
    tables = (
        ("Messages by role", {escape(k): n for k, n in found.roles.items()}),
        ("Conversations by questions", {str(k): n for k, n in sorted(found.exchanges.items())}),
        ("Calls by tool", {escape(k): n for k, n in found.tools.items()}),
    )
    blocks = "".join(_table(title, values) for title, values in tables if values)
    return f'<div class="tables">{blocks}</div>'


def _table(title: str, values: dict[str, int]) -> str:
    shown = list(values.items())[:12]
    rows = "".join(f"<tr><td>{name}</td><td>{count(n)}</td></tr>" for name, n in shown)
    more = f"<p>and {len(values) - len(shown)} more</p>" if len(values) > len(shown) else ""
    return f'<div><b>{title}</b><table class="findings">{rows}</table>{more}</div>'


def plan(found: Plan, data: DataSpec) -> str:
    """Return what a run would train on: tokens of an epoch, steps, and what is lost."""
    total = found.mixture.total
    cells = [
        ("tokens an epoch", count(total.tokens)),
        ("of them trained on", f"{total.supervised / max(1, total.tokens):.0%}"),
        ("examples an epoch", count(total.examples)),
        ("steps of the run", count(total.steps)),
        (
            f"real tokens in {'packed' if total.is_packed else 'padded'} batches",
            f"{total.efficiency:.0%}",
        ),
    ]
    if found.num_kept_out:
        cells.append(("conversations kept out", count(found.num_kept_out)))
    return _trouble(found, data) + _overlaps(found) + facts(cells) + _mixture(found.mixture)


def _trouble(found: Plan, data: DataSpec) -> str:
    words = ""
    if found.num_refused:
        words += notice(
            "bad",
            f"The model's template refuses {count(found.num_refused)} conversations; the run "
            "would not start.",
            "Statistics on the Datasets page name the first.",
        )
    if not found.num_too_long:
        return words
    long = f"{count(found.num_too_long)} examples have more than {count(data.max_length_tokens)}"
    if data.truncation == "refuse":
        return words + notice(
            "bad",
            f"{long} tokens; the run would not start.",
            f"Set the longest example to {count(found.longest)}, or choose cut or split.",
        )
    small = ""
    if found.num_nothing_left:
        small = f"{count(found.num_nothing_left)} conversations keep nothing that could be learned."
    kind = "bad" if found.num_nothing_left else "info"
    return words + notice(kind, f"{long} tokens; {count(found.lost_tokens)} are lost.", small)


def _overlaps(found: Plan) -> str:
    return "".join(
        notice(
            "bad",
            f"{count(shared.exact + shared.near)} of the {count(shared.num_eval)} records to be "
            f"measured are in {name} too, {count(shared.exact)} of them exactly.",
            "Their loss would show what was learned by heart: exclude them, or choose another "
            "evaluation dataset.",
        )
        for name, shared in found.overlaps.items()
    )


def _mixture(found: MixturePlan) -> str:
    if len(found.parts) < 2:
        return ""
    rows = "".join(
        f"<tr><td>{escape(part.dataset)}</td><td>{part.weight:g}</td>"
        f"<td>{part.conversations:,.0f}</td><td>{count(part.tokens)}</td>"
        f"<td>{part.tokens / max(1, found.total.tokens):.0%}</td></tr>"
        for part in found.parts
    )
    return (
        '<div class="scroll"><table class="findings"><tr><th>dataset</th><th>weight</th>'
        f"<th>conversations</th><th>tokens</th><th>share</th></tr>{rows}</table></div>"
    )
