"""How often the studio tries again: once where it crashes, more where it gets further."""

from hypothesis import given
from hypothesis import strategies as st

from studio.domain.outcome import ExitCode, is_retried
from studio.domain.retry import MAX_LOSSES, Attempts, after_crash, after_loss


def test_a_crash_is_tried_again_once_at_the_same_place() -> None:
    first = after_crash(Attempts(), 0)
    assert first == Attempts(crashes=1)
    assert after_crash(Attempts(crashes=1), 0) is None
    again = after_crash(Attempts(crashes=1, furthest=10), 11)
    assert again == Attempts(crashes=1, furthest=11)
    assert after_crash(Attempts(crashes=1, furthest=11), 11) is None
    assert after_crash(Attempts(crashes=1, furthest=11), 4) is None


def test_a_lost_worker_is_forgiven_more_often_than_a_crash() -> None:
    attempts: Attempts | None = Attempts()
    for count in range(1, MAX_LOSSES + 1):
        assert attempts is not None
        attempts = after_loss(attempts, 0)
        assert attempts == Attempts(losses=count)
    assert attempts is not None
    assert after_loss(attempts, 0) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_no_row_is_tried_for_ever(faults: list[tuple[bool, int]]) -> None:
    """However crashes and losses follow each other, each step that is reached buys few tries."""
    attempts: Attempts | None = Attempts()
    tries = 0
    for is_crash, step in faults:
        assert attempts is not None
        attempts = (after_crash if is_crash else after_loss)(attempts, step)
        if attempts is None:
            break
        tries += 1
    assert tries <= (5 + 1) * (1 + MAX_LOSSES)


def test_only_what_may_end_otherwise_is_tried_again() -> None:
    assert {code for code in ExitCode if is_retried(code)} == {
        ExitCode.UNEXPECTED,
        ExitCode.RETRY,
    }
    assert is_retried(-9)
    assert is_retried(137)
