"""From a conversation to tokens and mask: ours against transformers' apply_chat_template.

    python benchmarks/tokenise.py [--megabytes 8] [--vocabulary 32000] [--rounds 5]

Both make tokens and mask of the same chats on one core, in turns, so that a change of the machine's
pace meets both. Ours reads the canonical line; transformers is given messages that are parsed already
and a template with {% generation %} marks, which is how it makes a mask. Before anything is timed,
tokens and masks of all chats are compared, and one difference ends the benchmark.

transformers takes a token for generated if a generated character is in it, we if it begins with one;
so a token of line feeds that the header began may differ, and is counted.

The tokenizer is byte-level BPE with Qwen's expression, trained here on the chats, on this repository
and on Python's standard library: the published vocabularies (about 150,000 and 250,000 tokens) are
downloads that this cannot rely on.
"""

import argparse
import json
import logging
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import write_chats  # noqa: E402  # the line above finds it
from studio.disk import TEMPLATES  # noqa: E402
from studio.domain.conversation import Conversation  # noqa: E402
from studio.domain.openai_messages import from_openai  # noqa: E402
from studio.domain.reading import Reading  # noqa: E402
from studio.tokens import tokenizer as tokenizers_of_models  # noqa: E402
from studio.tokens.examples import ExampleMaker  # noqa: E402

# https://huggingface.co/Qwen/Qwen2.5-7B, tokenizer.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
BATCH = 200
GOAL = 4.0
log = logging.getLogger("tokenise")


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = make_lines(folder / "chats.jsonl", int(given.megabytes * 1e6), given.seed)
        train(folder, lines, given.vocabulary)
        log.info("%d chats, %.1f MB", len(lines), sum(map(len, lines)) / 1e6)
        ratio = compare(folder, lines, given.rounds)
    log.info("goal of %.0fx: %s", GOAL, "met" if ratio >= GOAL else "missed")


def make_lines(path: Path, num_bytes: int, seed: int) -> list[bytes]:
    """Return chats as canonical lines."""
    write_chats(path, num_bytes, seed)
    with path.open(encoding="utf-8") as file:
        return [from_openai(json.loads(line)).to_line() for line in file]


def train(folder: Path, lines: Sequence[bytes], size: int) -> None:
    """Write a tokenizer of a realistic size into a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size - len(SPECIAL) - len(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message.content for line in lines for message in Conversation.from_json(line).messages]
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [ROOT / "README.md", *sorted((ROOT / "studio").rglob("*.py")), *library]
    prose = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    tokenizer.train_from_iterator([*texts, *prose], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    log.info("vocabulary: %d tokens, trained here", tokenizer.get_vocab_size())


def marked(source: str) -> str:
    """Return the Instruct template with transformers' marks around each reply."""
    header = (
        "        {{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- if message.t"
    )
    tool = '\n    {%- elif message.role == "tool"'
    end = "{{- '<|im_end|>\\n' }}" + tool
    assert source.count(header) == source.count(end) == 1
    source = source.replace(header, header.replace(" + content", " }}{% generation %}{{- content"))
    return source.replace(end, "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}" + tool)


def compare(folder: Path, lines: Sequence[bytes], rounds: int) -> float:
    """Compare and time with one template; return how many times faster ours is."""
    source = (TEMPLATES / "chat" / "qwen3-next-instruct.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    fast = tokenizers_of_models.load(folder, folder)
    log.info("fast path: %s", "proven" if fast.fast else fast.why_slow)
    (verdict,) = folder.glob("*.fast.json")
    verdict.write_text('{"why_slow": "switched off", "odd": ""}', encoding="utf-8")
    slow = tokenizers_of_models.load(folder, folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    template = marked(source)
    records = [Conversation.from_json(line) for line in lines]
    parsed = [(record.template_messages(), list(record.tools) or None) for record in records]

    def transformers(index: int) -> Any:
        messages, tools = parsed[index]
        return theirs.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )

    def reader(maker: ExampleMaker) -> Callable[[int], Any]:
        return lambda index: maker.make(Conversation.from_json(lines[index]), index)

    contenders = {
        "transformers": transformers,
        "ours": reader(ExampleMaker(fast, Reading())),
        "ours without tiktoken": reader(ExampleMaker(slow, Reading())),
    }
    gate(contenders, len(lines))
    times = take_turns(contenders, len(lines), rounds)
    tokens = sum(len(contenders["ours"](index)[0].tokens) for index in range(len(lines)))
    base = statistics.median(times["transformers"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        log.info(
            "%-22s %7.0f chats/s %9.0f tokens/s  %.2fx (%.2f to %.2f over the rounds)",
            name,
            len(lines) / middle,
            tokens / middle,
            base / middle,
            *bounds([one / other for one, other in zip(times["transformers"], taken, strict=True)]),
        )
    return base / statistics.median(times["ours"])


def bounds(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest."""
    return min(ratios), max(ratios)


def gate(contenders: dict[str, Callable[[int], Any]], count: int) -> None:
    """End the benchmark where tokens or masks differ."""
    begun = 0
    for index in range(count):
        expected = contenders["transformers"](index)
        mask = np.array(expected["assistant_masks"], dtype=bool)
        for name in ("ours", "ours without tiktoken"):
            (example,) = contenders[name](index)
            if example.tokens.tolist() != expected["input_ids"]:
                sys.exit(f"{name}: the tokens of chat {index + 1} differ")
            # Where the header began a token: the first of a reply, for transformers alone.
            first = mask & ~np.roll(mask, 1)
            if not np.array_equal(example.mask | (first & mask), mask):
                sys.exit(f"{name}: the mask of chat {index + 1} differs")
            begun += int(np.count_nonzero(example.mask != mask))
    log.info("gate: tokens and masks of %d chats are the same,", count)
    log.info("but for %d tokens that a header began", begun // 2)


def take_turns(
    contenders: dict[str, Callable[[int], Any]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds that each took in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        taken = dict.fromkeys(contenders, 0.0)
        for start in range(0, count, BATCH):
            for name, make in contenders.items():
                began = time.perf_counter()
                for index in range(start, min(start + BATCH, count)):
                    make(index)
                taken[name] += time.perf_counter() - began
        for name, seconds in taken.items():
            times[name].append(seconds)
    return times


if __name__ == "__main__":
    main()
