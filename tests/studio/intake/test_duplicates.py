"""Equal and nearly equal records: what is caught, and what is left alone."""

import json
import random
import string
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation, Image, Message, PlainText, Preference, Record
from studio.domain.openai_messages import from_openai
from studio.intake.duplicates import SIMILARITY, Duplicates, Finder
from studio.intake.shingles import (
    MAX_TEXT_BYTES,
    band_hashes,
    jaccard,
    shingle_set,
    signatures,
)
from studio.intake.texts import texts_of

LETTERS = random.Random(1)
WORDS = ["".join(LETTERS.choices(string.ascii_lowercase, k=6)) for _ in range(3000)]


def words(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def talk(question: str, answer: str, *, system: str = "") -> Conversation:
    opening = (Message(role="system", content=system),) if system else ()
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Conversation(messages=opening + turns)


def find(records: Sequence[Record]) -> Duplicates:
    with Finder() as finder:
        for record in records:
            finder.add(record, record.to_line())
        return finder.find(lambda number: records[number])


def test_equal_records_name_the_first_one_and_tags_do_not_count() -> None:
    one, other = talk("a?", "b."), talk("c?", "d.")
    tagged = Conversation(messages=one.messages, tags=("seen",))
    found = find([one, other, one, tagged])
    assert found.exact.tolist() == [[2, 0], [3, 0]]
    assert found.near.tolist() == []
    assert found.groups.tolist() == [0, 1, 0, 0]
    assert found.is_complete


@pytest.mark.parametrize("seed", range(20))
def test_one_other_word_in_a_text_of_a_hundred_is_caught(seed: int) -> None:
    text = words(100, seed)
    changed = [*text]
    changed[seed * 5] = "otherwise"
    noise = [talk("Why?", " ".join(words(100, seed + 1000 + n))) for n in range(20)]
    found = find([talk("Why?", " ".join(text)), *noise, talk("Why?", " ".join(changed))])
    assert found.near.tolist() == [[21, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_only_letter_case_and_white_space_make_no_difference(seed: int) -> None:
    text = " ".join(words(3 + seed, seed))
    assert find([talk(text, text), talk(f" {text.upper()}\n", text)]).near.tolist() == [[1, 0]]


def test_a_short_question_with_another_answer_is_no_duplicate() -> None:
    question = "How long does the warranty of my station last?"
    one = talk(question, "It lasts 31 months.")
    other = talk(question, "That depends on where you bought it.")
    assert find([one, other]).near.tolist() == []


def test_one_long_document_with_two_answers_is_no_duplicate() -> None:
    document = " ".join(words(800, 5))
    one = talk(document + " Who wrote it?", "It was written by Ada.")
    other = talk(document + " Who wrote it?", "Nobody knows who has written it.")
    assert find([one, other]).near.tolist() == []


def test_one_long_system_message_does_not_make_records_alike() -> None:
    system = " ".join(words(800, 6))
    talks = [
        talk(f"What is {a}?", f"{a} is a {b}.", system=system)
        for a, b in combinations(WORDS[:9], 2)
    ]
    assert find(talks).near.tolist() == []


def test_the_same_words_about_another_picture_are_no_duplicate() -> None:
    def shown(ref: str) -> Conversation:
        asked = Message(role="user", content=" ".join(words(90, 7)), images=(Image(at=0, ref=ref),))
        return Conversation(messages=(asked, Message(role="assistant", content="A cat.")))

    assert find([shown("a.png"), shown("b.png")]).near.tolist() == []
    assert len(find([shown("a.png"), shown("a.png")]).exact) == 1


def test_the_example_data_set_has_no_duplicates() -> None:
    lines = (TEMPLATES / "data" / "tidemark-support.jsonl").read_text(encoding="utf-8").splitlines()
    found = find([from_openai(json.loads(line)) for line in lines])
    assert (len(found.exact), len(found.near)) == (0, 0)


def test_texts_and_preferences_are_compared_too() -> None:
    text = words(100, 8)
    texts = [PlainText(text=" ".join(text)), PlainText(text=" ".join([*text[:-1], "end"]))]
    assert find(texts).near.tolist() == [[1, 0]]
    answer = (Message(role="assistant", content=" ".join(text)),)
    worse = (Message(role="assistant", content="No."),)
    asked = (Message(role="user", content="Why?"),)
    one = Preference(messages=asked, chosen=answer, rejected=worse)
    turned = Preference(messages=asked, chosen=worse, rejected=answer)
    assert find([one, turned]).exact.tolist() == []


def test_languages_without_spaces_are_compared_by_their_signs() -> None:
    signs = "".join(random.Random(9).choices([chr(0x4E00 + n) for n in range(3000)], k=100))
    assert find([talk("?", signs), talk("?", signs[:50] + "々" + signs[51:])]).near.tolist() == [
        [1, 0]
    ]


def test_groups_are_those_of_a_comparison_of_all_with_all() -> None:
    generator = random.Random(10)
    texts = [words(60, seed) for seed in range(30)]
    for _ in range(60):
        copied = [*generator.choice(texts)]
        for _ in range(generator.randrange(4)):
            copied[generator.randrange(60)] = generator.choice(WORDS)
        texts.append(copied)
    talks = [talk("Tell me.", " ".join(text)) for text in texts]
    parents = list(range(len(talks)))
    answers = [shingle_set(texts_of(record)[1]) for record in talks]
    wholes = [shingle_set(" ".join(texts_of(record))) for record in talks]
    for one, other in combinations(range(len(talks)), 2):
        if (
            min(jaccard(answers[one], answers[other]), jaccard(wholes[one], wholes[other]))
            >= SIMILARITY
        ):
            low, high = sorted((parents[one], parents[other]))
            parents = [low if parent == high else parent for parent in parents]
    assert find(talks).groups.tolist() == parents


def test_records_without_words_are_never_alike() -> None:
    asked = Message(role="user", content="")
    call = Message(role="assistant", content=" ")
    records = [
        Conversation(messages=(asked, call)),
        Conversation(messages=(asked, asked, call)),
        talk("Why?", "So."),
    ]
    assert find(records).groups.tolist() == [0, 1, 2]


def test_a_text_over_the_limit_is_only_compared_as_a_whole() -> None:
    long = " ".join(words(MAX_TEXT_BYTES // 6, 11))
    found = find([PlainText(text=long), PlainText(text=f"{long} more"), PlainText(text=long)])
    assert (found.exact.tolist(), found.near.tolist()) == ([[2, 0]], [])


def test_no_records_and_one_record() -> None:
    assert find([]).groups.tolist() == []
    assert find([talk("a?", "b.")]).groups.tolist() == [0]


def test_a_signature_does_not_depend_on_what_stands_beside_it() -> None:
    texts = [" ".join(words(5 + 7 * n, n)).encode() for n in range(40)]
    together, _ = signatures(texts)
    alone = np.concatenate([signatures([text])[0] for text in texts])
    assert np.array_equal(together, alone)
    assert band_hashes(together).tolist() == band_hashes(alone).tolist()


def test_signatures_estimate_the_similarity() -> None:
    errors = []
    for seed in range(100):
        text = words(200, seed)
        other = [*text[: 100 + seed], *words(100 - seed, seed + 500)]
        rows, _ = signatures([" ".join(text).encode(), " ".join(other).encode()])
        exact = jaccard(shingle_set(" ".join(text)), shingle_set(" ".join(other)))
        errors.append(float((rows[0] == rows[1]).mean()) - exact)
    # 60 entries have a standard deviation of at most 0.065.
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.065
