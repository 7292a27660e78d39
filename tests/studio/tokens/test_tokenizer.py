"""Tokenizers: both paths give the tokens and places of the tokenizers library, or there is one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from studio.disk import TEMPLATES
from studio.domain.preset import load_models
from studio.errors import InputError
from studio.tokens.bpe import judge, read_vocabulary
from studio.tokens.tiny import write_tokenizer
from studio.tokens.tokenizer import ModelTokenizer, load, tokenizer_sha256
from tests.conversations import ODD_PIECES

MODELS = {model.id: model for model in load_models(TEMPLATES / "models").values()}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(MODELS["tiny/qwen3.5"], folder)
    return folder


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture(scope="module")
def tokenizer(folder: Path, verdicts: Path) -> ModelTokenizer:
    return load(folder, verdicts)


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Write a copy of the folder whose tokenizer.json is changed."""

    def change(edit: Change) -> Path:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        edit(values)
        (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return change


# ---- the same tokens ----------------------------------------------------------------------------

TEXTS = st.lists(
    st.text(max_size=12)
    | ODD_PIECES
    | st.sampled_from(
        [
            "  ",
            "\r\n",
            "\t",
            "'s",
            "'LL",
            "12345",
            "e\u0301",
            "\u1e9b\u0323",
            "\ud7a3",
            "\u1100\u1161",
        ]
    )
    | st.sampled_from(
        ["日本語の", "naïve café", "👩‍👩‍👧", "Привет", "مرحبا", "\u0378", "\U0001fae9"]
    ),
    max_size=12,
).map("".join)


def check(tokenizer: ModelTokenizer, text: str) -> None:
    tokens, starts = tokenizer.encode(text)
    slow_tokens, slow_starts = tokenizer.encode_slowly(text)
    assert tokens.tolist() == slow_tokens.tolist()
    assert starts.tolist() == slow_starts.tolist()
    assert tokens.dtype == starts.dtype == slow_tokens.dtype == slow_starts.dtype == np.uint32


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_both_paths_give_the_same_tokens_and_places(tokenizer: ModelTokenizer, text: str) -> None:
    assert tokenizer.fast
    check(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    ["", " " * 300_000, " " * 300_000 + "x", "a" * 200_000, "\n" * 100_000, "\u00a0" * 200_000],
    ids=lambda text: f"{len(text)} of {text[:1]!r}",
)
def test_texts_of_one_character_give_the_same_tokens(tokenizer: ModelTokenizer, text: str) -> None:
    check(tokenizer, text)


def test_places_are_those_that_the_library_gives_with_the_text(
    tokenizer: ModelTokenizer, folder: Path
) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "naïve 🌊🌊 <|im_start|>user\n日本語 e\u0301<think>"
    encoding = library.encode(text, add_special_tokens=False)

    tokens, starts = tokenizer.encode(text)

    assert tokens.tolist() == encoding.ids
    assert starts.tolist() == [start for start, _ in encoding.offsets]


def test_the_texts_of_tokens_make_the_text(tokenizer: ModelTokenizer) -> None:
    text = "Plain text, <|im_end|> and é."
    tokens, _ = tokenizer.encode(text)

    assert "".join(tokenizer.decode_token(token) for token in tokens).replace("\ufffd", "") in (
        text,
        text.replace("é", ""),
    )
    assert tokenizer.decode_token(tokenizer.token_id("<think>") or 0) == "<think>"
    assert tokenizer.token_id("<nothing>") is None


# ---- the test of the fast path ------------------------------------------------------------------


def test_the_fast_path_is_taken_where_it_is_proven(tokenizer: ModelTokenizer) -> None:
    assert (tokenizer.fast, tokenizer.why_slow) == (True, "")


def test_the_verdict_is_kept_by_tokenizer(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"why_slow":"as it stands here","odd":""}', encoding="utf-8")

    again = load(folder, tmp_path)

    assert (again.fast, again.why_slow) == (False, "as it stands here")


def test_characters_that_the_two_read_differently_go_the_slow_way(
    folder: Path, tmp_path: Path
) -> None:
    load(folder, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"why_slow":"","odd":"\u00e9\U0001f30a"}', encoding="utf-8")

    tokenizer = load(folder, tmp_path)

    for text in ("naïve", "café", "wave 🌊", "boat ⛵", "rocket 🚀"):
        check(tokenizer, text)


def merges_out_of_order(values: dict[str, Any]) -> None:
    merges = values["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]


def another_expression(values: dict[str, Any]) -> None:
    pattern = values["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    # Letters of all scripts for the engine of tokenizers, of ASCII for that of tiktoken.
    pattern["Regex"] = "[[:alpha:]]+|" + pattern["Regex"]


def other_digits(values: dict[str, Any]) -> None:
    pattern = values["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = "[[:digit:]]+|" + pattern["Regex"]


def split_by_spaces(values: dict[str, Any]) -> None:
    values["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    )


def no_merges_for_a_token(values: dict[str, Any]) -> None:
    model = values["model"]
    gone = model["merges"].pop(300)
    assert "".join(gone) in model["vocab"]


def lower_case(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "Lowercase"}


def greedy_token(values: dict[str, Any]) -> None:
    values["added_tokens"][0]["lstrip"] = True


def token_in_token(values: dict[str, Any]) -> None:
    values["added_tokens"][0]["content"] = "<think>x"


def trimmed_places(values: dict[str, Any]) -> None:
    values["post_processor"]["trim_offsets"] = True


def dropout(values: dict[str, Any]) -> None:
    values["model"]["dropout"] = 0.1


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (merges_out_of_order, "not in the order of its number"),
        (another_expression, "differently"),
        (split_by_spaces, "not cut by one regular expression"),
        (no_merges_for_a_token, "is not merged into itself"),
        (lower_case, "another way than NFC"),
        (greedy_token, "takes spaces beside it"),
        (token_in_token, "is a part of another"),
        (trimmed_places, "left out of the places"),
        (dropout, "options that tiktoken does not know"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tokenizer_that_tiktoken_cannot_follow_goes_the_slow_way(
    changed: Callable[[Change], Path], edit: Change, why: str
) -> None:
    tokenizer = load(changed(edit))

    assert not tokenizer.fast
    assert why in tokenizer.why_slow
    if edit is not dropout:
        check(tokenizer, "Slow, but right: 🌊 <think> 12")


def test_the_self_test_finds_characters_that_are_cut_differently(
    changed: Callable[[Change], Path],
) -> None:
    tokenizer = load(changed(other_digits))

    assert tokenizer.fast
    # Arabic digits, which only one of the two takes together.
    for text in ("\u0661\u0662\u0663", "a 123 \u0661\u0662\u0663 b", "123 45"):
        check(tokenizer, text)
    verdict = judge((changed(other_digits) / "tokenizer.json").read_text(encoding="utf-8"))
    assert "\u0661" in verdict.odd
    assert not set("0123456789") & set(verdict.odd)


def test_an_expression_that_tiktoken_cannot_read_is_named(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\X"

    assert r"Invalid escape: \X" in judge(json.dumps(values)).why_slow


# ---- files --------------------------------------------------------------------------------------


def test_every_byte_has_a_token(folder: Path) -> None:
    vocabulary = read_vocabulary((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert vocabulary is not None
    assert {bytes([byte]) for byte in range(256)} <= vocabulary.ranks.keys()


def test_a_text_ends_with_the_token_for_that(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.end_of_text == tokenizer.token_id("<|endoftext|>")


def test_the_template_may_stand_in_the_configuration(
    folder: Path, tmp_path: Path, verdicts: Path
) -> None:
    source = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"

    config.write_text('{"chat_template": "{{ one }}"}', encoding="utf-8")
    assert load(tmp_path, verdicts).template == "{{ one }}"
    named = [{"name": "default", "template": "{{ two }}"}, {"name": "tools", "template": "{{ t }}"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert load(tmp_path, verdicts).template == "{{ two }}"
    (tmp_path / "chat_template.jinja").write_text("{{ three }}", encoding="utf-8")
    assert load(tmp_path, verdicts).template == "{{ three }}"


def test_the_hash_knows_tokenizer_and_template(
    tokenizer: ModelTokenizer, folder: Path, changed: Callable[[Change], Path]
) -> None:
    assert tokenizer.sha256 == tokenizer_sha256(folder)
    other = changed(dropout)
    second = tokenizer_sha256(other)
    (other / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")

    assert len({tokenizer.sha256, second, tokenizer_sha256(other)}) == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "tokenizer.json in the folder .* is missing"),
        ({"tokenizer.json": "{"}, "tokenizer.json in the folder .* is none"),
        ({"tokenizer.json": None}, "has no chat template"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "is not JSON"),
    ],
)
def test_what_is_missing_or_broken_is_said(
    folder: Path, tmp_path: Path, files: dict[str, str | None], words: str
) -> None:
    for name, text in files.items():
        whole = (folder / name).read_text(encoding="utf-8") if text is None else text
        (tmp_path / name).write_text(whole, encoding="utf-8")
    if "tokenizer.json" in files and files["tokenizer.json"] is not None:
        (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")

    with pytest.raises(InputError, match=words):
        load(tmp_path)


def test_a_model_without_a_template_is_told_which_there_are(folder: Path, tmp_path: Path) -> None:
    source = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")

    with pytest.raises(InputError) as caught:
        load(tmp_path)

    assert "qwen3-next-thinking.jinja" in caught.value.hint


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    values = {"version": "1.0", "added_tokens": [], "model": words}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    source = json.dumps(values | dict.fromkeys(names))
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")

    with pytest.raises(InputError, match="not byte-level BPE"):
        load(tmp_path)
