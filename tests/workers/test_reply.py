"""Text comes in whole pieces, wherever the tokens break."""

import pytest
import torch

from studio.disk import Home
from studio.domain.spec import ModelRef
from workers.engine.model import find_base, load_tokenizer
from workers.reply import Detokenizer, Piece, Splitter, StopCutter, pieces


def test_text_comes_in_whole_characters_without_special_tokens(models_home: Home) -> None:
    tokenizer = load_tokenizer(find_base(ModelRef(id="tiny/qwen3.5"), models_home))

    def text_of(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    sentence = "Gr\u00fc\u00dfe \u4f60\u597d \N{WATER WAVE}\u200d\N{HEAVY BLACK HEART}<|im_end|>!"
    noise = torch.randint(0, len(tokenizer), (400,), generator=torch.Generator().manual_seed(1))
    for tokens in (tokenizer.encode(sentence), noise.tolist()):
        writer = Detokenizer(text_of)
        parts = [writer.push(token) for token in tokens]
        assert not any(part.endswith("\N{REPLACEMENT CHARACTER}") for part in parts)
        assert "".join(parts) + writer.flush() == text_of(tokens)
    assert "im_end" not in text_of(tokenizer.encode(sentence))


def test_a_stop_sequence_cuts_wherever_the_pieces_break() -> None:
    text = "one STO two STOP three"
    for size in range(1, len(text)):
        cutter = StopCutter(["STOP", "three"])
        written = ""
        for at in range(0, len(text), size):
            if not cutter.is_cut:
                written += cutter.push(text[at : at + size])
        assert (written, cutter.is_cut, cutter.flush()) == ("one STO two ", True, "")
    cutter = StopCutter(["STOP"])
    assert (cutter.push("almost STO"), cutter.flush(), cutter.is_cut) == ("almost ", "STO", False)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thinking_is_told_from_content_wherever_the_pieces_break(size: int) -> None:
    text = "First </th a, then\n\nb.\n</think>\n\nThe answer\n</think> is c."
    splitter = Splitter(is_thinking=True)
    parts = [splitter.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(splitter.flush())

    assert "".join(part[0] for part in parts) == "First </th a, then\n\nb."
    assert "".join(part[1] for part in parts) == "The answer\n</think> is c."


def test_a_reply_says_why_it_ended() -> None:
    letters = dict(enumerate("abcdefgh"))

    def last(stop: list[str], *, ends: int = 99) -> tuple[str, Piece]:
        found = list(
            pieces(
                [0, None, 1, 2, 3],
                lambda tokens: "".join(letters[token] for token in tokens),
                stop_ids=frozenset([ends]),
                stop=stop,
                is_thinking=False,
            )
        )
        return "".join(piece.content for piece in found), found[-1]

    assert last([]) == ("abcd", Piece(num_tokens=4, content="", finish_reason="length"))
    assert last([], ends=2) == ("ab", Piece(num_tokens=3, content="", finish_reason="stop"))
    assert last(["bc"])[0] == "a"
    assert last(["bc"])[1].finish_reason == "stop"
    assert last(["dx"])[0] == "abcd"
