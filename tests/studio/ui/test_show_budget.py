"""A memory budget as HTML: the bar and the table say the same, and text is text."""

import re
from dataclasses import replace

from studio.domain.budget import GIB, PART_TITLES, Budget, Part
from studio.services.budgets import Card, Estimate
from studio.ui import show_budget

EVIL = "\"'><script>alert(1)</script>"


def budget() -> Budget:
    return Budget(
        method="qlora",
        cards=1,
        tokens=2048,
        num_layers=48,
        recomputed=tuple(range(12)),
        moment="layer 11",
        parts=(
            Part(name="weights", num_bytes=30 * GIB),
            Part(name="activations", num_bytes=10 * GIB),
        ),
    )


def estimate(gib: int = 80) -> Estimate:
    return Estimate(budget=budget(), card=Card(title="NVIDIA H200", memory_bytes=gib * GIB))


def widths(html: str) -> list[float]:
    return [float(found) for found in re.findall(r"width:([\d.]+)%", html)]


def test_every_part_has_a_colour_of_its_own() -> None:
    assert show_budget.COLOURS.keys() == PART_TITLES.keys()
    assert len(set(show_budget.COLOURS.values())) == len(PART_TITLES)


def test_the_bar_is_drawn_against_the_card() -> None:
    html = show_budget.estimate(estimate())
    assert widths(html) == [37.5, 12.5]
    assert "fits, 12 of 48 layers recomputed" in html
    assert 'class="notice good"' in html
    assert "backward pass of layer 11" in html


def test_what_is_too_large_fills_the_bar_and_the_card_is_a_line_in_it() -> None:
    tight = replace(estimate(20), problem="It needs 40.0 GiB.", hint="Take a smaller one.")
    html = show_budget.estimate(tight)
    assert widths(html) == [75.0, 25.0]
    assert "left:50.00%" in html
    assert 'class="notice bad"' in html
    assert "It needs 40.0 GiB." in html
    assert "Take a smaller one." in html


def test_colours_are_never_alone() -> None:
    html = show_budget.estimate(estimate())
    label = re.search(r'role="img" aria-label="([^"]+)"', html)
    assert label is not None
    assert label[1] == "Weights 30.0 GiB, Kept activations 10.0 GiB; 40.0 GiB in all"
    for part in budget().parts:
        assert f"{part.title}</td><td>" in html


def test_without_a_card_nothing_is_judged() -> None:
    html = show_budget.estimate(replace(estimate(), card=None))
    assert 'class="notice info"' in html
    assert widths(html) == [75.0, 25.0]
    assert "not known yet" in show_budget.estimate(None)


def test_text_is_text() -> None:
    evil = Estimate(
        budget=budget(),
        card=Card(title=EVIL, memory_bytes=GIB),
        reason=EVIL,
        problem=EVIL,
        hint=EVIL,
    )
    html = show_budget.estimate(evil)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
