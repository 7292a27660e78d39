"""Proofs and recall: an answer is right when it holds the fact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from studio.domain.proof import Answer, Proof, Proofs, Recall

LETTERS = st.text("abcdefghij 0123456789")


def answer(base: str, tuned: str, fact: str = "31 months") -> Answer:
    return Answer(question="How long is the warranty?", fact=fact, base=base, tuned=tuned)


@given(LETTERS, LETTERS, LETTERS.filter(bool))
def test_an_answer_is_right_when_it_holds_the_fact_in_any_case(
    before: str, after: str, fact: str
) -> None:
    found = answer(base=before + fact.upper() + after, tuned=before + fact + after, fact=fact)

    assert found.base_is_right
    assert found.tuned_is_right


def test_an_answer_without_the_fact_is_wrong() -> None:
    found = answer(base="It lasts 3 months.", tuned="")

    assert not found.base_is_right
    assert not found.tuned_is_right


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_recall_counts_right_answers_of_both_models(rows: list[tuple[bool, bool]]) -> None:
    said = {True: "It is 31 months.", False: "I do not know."}
    recall = Recall(answers=tuple(answer(said[base], said[tuned]) for base, tuned in rows))

    assert recall.base_right == sum(base for base, _ in rows)
    assert recall.tuned_right == sum(tuned for _, tuned in rows)
    assert Recall.model_validate_json(recall.model_dump_json()) == recall


@pytest.mark.parametrize("passed", [True, False, None])
def test_a_proof_holds_fails_or_only_informs_and_survives_its_file(passed: bool | None) -> None:
    proofs = Proofs(
        proofs=(Proof(name="targets", passed=passed, summary="28 of 28.", details={"n": [28]}),)
    )

    assert Proofs.model_validate_json(proofs.model_dump_json()) == proofs


def test_a_proof_must_say_whether_it_passed() -> None:
    with pytest.raises(ValidationError):
        Proof.model_validate({"name": "targets", "summary": "28 of 28."})
