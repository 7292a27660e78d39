"""Values as HTML. Every text that a user or a model wrote is escaped here."""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape

from studio.domain.certificate import Certificate
from studio.domain.preset import Preset
from studio.domain.proof import Proof, Recall
from studio.domain.run import RunState, Wish
from studio.services.runs import Progress, state_of
from studio.store.rows import RunRow

MAX_SHOWN_ISSUES = 20


def empty(title: str, text: str) -> str:
    """Return what stands where nothing is yet: what it is for, and what to do."""
    return f'<div class="empty"><b>{escape(title)}</b>{escape(text)}</div>'


def notice(kind: str, text: str, small: str = "") -> str:
    """Return a banner; `kind` is good, bad or info."""
    below = f"<small>{escape(small)}</small>" if small else ""
    return f'<div class="notice {kind}" role="status">{escape(text)}{below}</div>'


def facts(values: Sequence[tuple[str, str]]) -> str:
    """Return a row of figures: (label, value)."""
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in values)
    return f'<div class="facts">{cells}</div>'


def size(num_bytes: float) -> str:
    """Return a size in the largest unit that leaves at least 1."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(num_bytes, 1024)), len(units))
    return f"{num_bytes / 1024**power:.1f} {units[power - 1]}"


def duration(seconds: float) -> str:
    """Return a duration in words: 45 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def ago(moment: float) -> str:
    """Return how long ago a moment was."""
    seconds = max(0.0, time.time() - moment)
    if seconds < 60:
        return "just now"
    if seconds < 86_400:
        return f"{duration(seconds // 60 * 60).removesuffix(' 0 s')} ago"
    return time.strftime("%d %b %Y", time.localtime(moment))


def count(number: int) -> str:
    """Return a number with thin groups, as in 1,234,567."""
    return f"{number:,}"


def counted(number: int, things: str) -> str:
    """Return a number of things, as in `1 conversation` or `1,204 conversations`."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def preset(found: Preset) -> str:
    """Return a Preset's card."""
    needs = found.needs
    if needs.gpus == 0:
        machine = "runs on this machine's CPU"
    else:
        cards = f"{needs.gpus} GPU{'s' if needs.gpus > 1 else ''}"
        memory = f" of {needs.gpu_memory_gib:g} GiB" if needs.gpu_memory_gib else ""
        machine = f"needs {cards}{memory}"
        if needs.memory_basis:
            machine += f" ({needs.memory_basis})"
    link = (
        f'<a href="{escape(found.source, quote=True)}" target="_blank" rel="noreferrer noopener">'
        "source of its choices</a>"
    )
    return (
        f'<div class="notice info"><b>{escape(found.title)}</b><br>{escape(found.summary)}'
        f"<small>{escape(machine)} · {link}</small></div>"
    )


def chip(state: str) -> str:
    """Return a state as a coloured chip."""
    return f'<span class="chip {escape(state)}">{escape(state)}</span>'


def run_head(row: RunRow, done: Progress, why: str = "") -> str:
    """Return name, state, progress bar and time left of a Run; `why` says what it waits for."""
    fraction = done.fraction or 0.0
    if RunState(row.state) is RunState.FINISHED:
        fraction = 1.0
    steps = f"step {row.step} of {row.total_steps}" if row.total_steps else "no step yet"
    right = []
    if done.elapsed_seconds is not None:
        right.append(
            f"{duration(done.elapsed_seconds)} so far"
            if RunState(row.state).is_live
            else f"took {duration(done.elapsed_seconds)}"
        )
    if done.left_seconds is not None:
        low, high = (duration(value) for value in done.left_seconds)
        right.append(f"{low} left" if low == high else f"{low} to {high} left")
    # What the engine said last may be of a moment before the wish.
    stage = "" if row.state == RunState.STOPPING else row.stage
    doing = why or stage or _state_words(row)
    body = (
        f'<div class="head"><h3>{row.id} · {escape(row.name)}</h3>{chip(state_of(row))}</div>'
        f'<div class="meter" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{fraction * 100:.0f}" aria-label="progress">'
        f'<i style="width:{fraction * 100:.1f}%"></i></div>'
        f'<div class="under"><span>{steps} · {escape(doing)}</span>'
        f"<span>{escape(' · '.join(right))}</span></div>"
    )
    if row.state == RunState.FAILED:
        words = row.error or {}
        body += notice("bad", words.get("message", "It failed."), words.get("hint", ""))
    return body


def _state_words(row: RunRow) -> str:
    kept = (row.result or {}).get("kept_step", row.step)
    if row.state == RunState.FINISHED and kept != row.step:
        early = "" if row.step == row.total_steps else " early"
        return f"finished{early}; what is kept is step {kept}, the best evaluation"
    return {
        RunState.QUEUED: "waiting for a worker",
        RunState.RUNNING: "starting",
        RunState.STOPPING: "pausing at the next step"
        if row.wish == Wish.PAUSE
        else "stopping at the next step",
        RunState.STOPPED: "stopped; what it had learned is kept"
        if row.step
        else "stopped before its first step",
        RunState.FINISHED: "finished",
        RunState.FAILED: "failed",
    }[RunState(row.state)]


def proofs(found: Sequence[Proof], recalled: Recall | None, *, is_over: bool) -> str:
    """Return the Proofs of a Run as stamps."""
    stamps = [_stamp(p.name, p.passed, p.summary) for p in found]
    if recalled is not None:
        right, all_ = recalled.tuned_right, len(recalled.answers)
        text = (
            f"The tuned model answers {right} of {all_} factual questions right, "
            f"the base {recalled.base_right}."
        )
        stamps.append(_stamp("recall", right * 10 >= all_ * 8, text))
    if not stamps:
        if is_over:
            return notice("info", "The run ended before it had measured anything.")
        return notice("info", "Proofs appear here as soon as the run has measured them.")
    return f'<div class="stamps">{"".join(stamps)}</div>'


def _stamp(name: str, passed: bool | None, text: str) -> str:
    kind = {True: "good", False: "bad", None: "info"}[passed]
    word = {True: "passed", False: "failed", None: "noted"}[passed]
    return (
        f'<div class="stamp {kind}"><b title="{word}">{escape(name)} · {word}</b>'
        f"<span>{escape(text)}</span></div>"
    )


_VERDICTS = {
    "adapter": "The merged model is the base plus the adapter, and nothing else.",
    "full": "The merged model is what the run wrote; outside the text model nothing changed.",
}


def certificate(found: Certificate) -> str:
    """Return a Certificate: the verdict, the figures, and what they were computed from."""
    kind, word = ("good", "PASSED") if found.passed else ("bad", "FAILED")
    changed = f"{len(found.changed_tensors)} of {len(found.targeted_tensors)}"
    verdict = _VERDICTS[found.kind] if found.passed else " ".join(found.failures)
    is_full = found.kind == "full"
    tuned = "trained model" if is_full else "adapter"
    cells = [
        ("targeted tensors changed", changed),
        ("other tensors changed", str(len(found.unexpected_tensors))),
        (f"nats between {tuned} and merge, at most {found.max_kl:.2g}", f"{found.mean_kl:.2g}"),
        (f"nats between base and {tuned}", f"{found.effect_kl:.2g}"),
        ("same first choice of token (informs)", f"{found.top1_agreement:.1%}"),
        ("largest logit difference (informs)", f"{found.max_logit_difference:.3g}"),
        ("weights in", found.dtype),
    ]
    if not is_full:
        cells[2:2] = [
            ("of the change carried, worst tensor", _worst(found.delta_kept)),
            ("of the change fit into 16 bits, worst tensor", _worst(found.delta_held)),
        ]
    if found.relative_change:
        largest = max(found.relative_change.values())
        cells.insert(2, ("largest change of a tensor, by its size", f"{largest:.2g}"))
    if found.idle_experts:
        cells.insert(2, ("matrices of experts that no token changed", count(found.idle_experts)))
    prompts = "".join(
        f"<tr><td>{escape(p.prompt[:90])}</td><td>{p.num_tokens}</td>"
        f"<td>{p.mean_kl:.2g}</td><td>{p.effect_kl:.2g}</td>"
        f"<td>{p.max_logit_difference:.3g}</td><td>{p.top1_agreement:.1%}</td></tr>"
        for p in found.prompts
    )
    still = ""
    if is_full and found.missing_tensors:
        still = (
            f"<details><summary>{len(found.missing_tensors)} tensors stayed as they were: what "
            f"training changed of them is less than {escape(found.dtype)} can tell</summary><pre>"
            f"{escape(chr(10).join(found.missing_tensors))}</pre></details>"
        )
    files = "\n".join(f"{sha[:16]}  {name}" for name, sha in sorted(found.files.items()))
    return (
        f'<div class="seal {kind}"><i>{word}</i><span>{escape(verdict)}</span></div>'
        + facts(cells)
        + f"<details><summary>{tuned.capitalize()} against merge, prompt by prompt</summary>"
        "<p>In a mixture of experts rounding sends some tokens to other experts; so first choices "
        'and logits inform, and the nats decide.</p><div class="scroll">'
        '<table class="findings"><tr><th>prompt</th><th>tokens</th><th>KL to merge</th>'
        "<th>KL to base</th><th>largest logit difference</th><th>same first choice</th></tr>"
        f"{prompts}</table></div></details>{still}"
        f"<details><summary>Changed tensors ({len(found.changed_tensors)})</summary>"
        f"<pre>{escape(chr(10).join(found.changed_tensors))}</pre></details>"
        f"<details><summary>Files and their hashes</summary><pre>{escape(files)}</pre></details>"
    )


def _worst(shares: Mapping[str, float]) -> str:
    """Return the share that strays furthest from the whole."""
    return f"{max(shares.values(), key=lambda share: abs(share - 1)):.1%}" if shares else "none"


def recall(found: Recall) -> str:
    """Return the answers to the factual questions, base and tuned side by side."""
    rows = "".join(
        f"<tr><td>{escape(a.question)}<br><small>fact: {escape(a.fact)}</small></td>"
        f"<td class='no'>{escape(a.base[:80])}</td>"
        f"<td class='{'yes' if a.tuned_is_right else 'no'}'>{escape(a.tuned[:160])}</td></tr>"
        for a in found.answers
    )
    head = notice(
        "good" if found.tuned_right * 10 >= len(found.answers) * 8 else "bad",
        f"Tuned: {found.tuned_right} of {len(found.answers)} right. "
        f"Base: {found.base_right} of {len(found.answers)}.",
        "A tiny base has random weights, so its answers are noise; it cannot know the facts.",
    )
    return (
        f'{head}<div class="scroll"><table class="findings answers"><tr><th>question</th>'
        f"<th>base</th><th>tuned</th></tr>{rows}</table></div>"
    )
