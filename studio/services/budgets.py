"""Verbs of memory: what a run would need of each card, before it is launched."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from studio.domain.budget import GIB, Budget
from studio.domain.recompute_plan import choose_method, in_gib, least_budget
from studio.domain.spec import JobSpec
from studio.errors import InputError
from studio.services.models import config_of
from studio.services.studio import Studio

# More than any card has; beyond it a number is a slip.
MOST_CARD_GIB = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The card that a Budget is compared with.

    Attributes:
        title: What it is, as in `NVIDIA H200`.
        memory_bytes: Its memory.
    """

    title: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A Budget beside a card.

    Attributes:
        budget: With the fewest recomputed layers that fit, or, where nothing fits, with the least
            memory.
        card: None where none is known, and on a CPU.
        reason: Why the base is held as it is, where the spec left that open.
        problem: What does not fit; empty when it does.
        hint: What would.
    """

    budget: Budget
    card: Card | None
    reason: str = ""
    problem: str = ""
    hint: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether the card holds it; None where there is no card to say."""
        return None if self.card is None else not self.problem

    def to_values(self) -> dict[str, Any]:
        """Return it in plain values, bytes as whole numbers."""
        budget = self.budget
        return {
            "method": budget.method,
            "cards": budget.cards,
            "tokens": budget.tokens,
            "total_bytes": budget.total_bytes,
            "parts": {part.name: part.num_bytes for part in budget.parts},
            "moment": budget.moment,
            "num_layers": budget.num_layers,
            "recomputed_layers": list(budget.recomputed),
            "card": None if self.card is None else self.card.title,
            "card_bytes": None if self.card is None else self.card.memory_bytes,
            "fits": self.fits,
            "reason": self.reason,
            "problem": self.problem,
            "hint": self.hint,
        }


def budget_of(studio: Studio, spec: JobSpec, card_gib: float | None = None) -> Estimate | None:
    """Return what a run would need of each card, and which layers it would recompute.

    Args:
        studio: The installation.
        spec: Any; its Dataset is not looked at.
        card_gib: Memory of a card; by default that of this machine's, else what its preset names.

    Returns:
        None for a model whose configuration is not known yet.

    Raises:
        InputError: The model cannot be trained, the targets do not fit it, or there is no such
            card.
    """
    if card_gib is not None and not 1 <= card_gib <= MOST_CARD_GIB:
        raise InputError(
            f"A card of {card_gib:g} GiB does not exist.",
            f"Give its memory in GiB, from 1 to {MOST_CARD_GIB:,}.",
            field="card",
        )
    config = config_of(studio, spec.model.id, spec.model.revision)
    if config is None:
        return None
    card = _card(studio, spec, card_gib)
    memory_bytes = None if card is None else card.memory_bytes
    least = least_budget(config, spec)
    try:
        choice = choose_method(config, spec, memory_bytes)
    except InputError as error:
        return Estimate(budget=least, card=card, problem=error.message, hint=error.hint)
    reason = choice.reason if spec.method == "auto" else ""
    return Estimate(budget=choice.budget, card=card, reason=reason)


def least_gib(studio: Studio, spec: JobSpec) -> float | None:
    """Return the least memory that a run can do with on each card, in GiB.

    Returns:
        None on the CPU, and for a model whose configuration is not known yet.

    Raises:
        InputError: The model cannot be trained, or the targets do not fit it.
    """
    config = config_of(studio, spec.model.id, spec.model.revision) if spec.train.num_gpus else None
    return None if config is None else least_budget(config, spec).total_bytes / GIB


def _card(studio: Studio, spec: JobSpec, card_gib: float | None) -> Card | None:
    if not spec.train.num_gpus:
        return None
    if card_gib is not None:
        return Card(title=f"a card of {card_gib:g} GiB", memory_bytes=round(card_gib * GIB))
    here = cards_here()
    if len(here) >= spec.train.num_gpus:
        # Which of them the run gets is not known: the smallest must do.
        return min(here, key=lambda card: card.memory_bytes)
    preset = studio.presets.get(spec.preset)
    named = preset.needs.gpu_memory_gib if preset is not None else None
    if named is None:
        return None
    return Card(title="the memory that the preset names", memory_bytes=round(named * GIB))


@lru_cache(maxsize=1)
def cards_here() -> tuple[Card, ...]:
    """Return this machine's cards whose memory is known; asked once, as it takes a moment."""
    command = [sys.executable, "-m", "workers.gpus"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(answer.stdout) if answer.returncode == 0 else []
    return tuple(
        Card(title=card["name"], memory_bytes=round(card["total_gib"] * GIB))
        for card in found
        if card["total_gib"] is not None
    )


def verdict(found: Estimate) -> str:
    """Return in a sentence what a run needs and whether that fits."""
    budget = found.budget
    if found.problem:
        return found.problem
    where = "each card" if budget.cards > 1 else "the card" if budget.cards else "the machine"
    needs = f"A micro-batch of {budget.tokens:,} tokens needs {in_gib(budget.total_bytes)} of"
    if found.card is None:
        return f"{needs} {where}, {budget.plan}."
    return f"{needs} the {in_gib(found.card.memory_bytes)} of {where} and fits, {budget.plan}."
