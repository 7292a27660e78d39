"""Sample replies: grouped by prompt, newest first, never as markup."""

from studio.domain.sample import Sample
from studio.ui.show_samples import samples


def said(step: int, prompt: str, reply: str, *, is_cut: bool = False) -> Sample:
    return Sample(step=step, prompt=prompt, reply=reply, is_cut=is_cut)


def test_replies_stand_under_their_prompt_newest_first() -> None:
    html = samples([said(0, "Who?", "asdf", is_cut=True), said(0, "Why?", "qwer")])
    html += samples([said(0, "Who?", "asdf"), said(120, "Who?", "Tidemark.")])
    assert html.index("asdf") < html.index("qwer")
    assert html.rindex("Step 120") < html.rindex("Before the first step")
    assert html.count("cut at the longest sample") == 1


def test_nothing_is_markup_and_no_reply_is_said() -> None:
    html = samples([said(3, "<b>?</b>", "<img src=x onerror=1>"), said(4, "<b>?</b>", "")])
    assert "<img" not in html
    assert "<b>?</b>" not in html
    assert "<i>nothing</i>" in html
    assert samples([]) == ""
