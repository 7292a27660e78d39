"""Chats of made-up words whose lengths in tokens are those of people's: log-normal, a long tail.

benchmarks/chats.py makes chats whose lengths follow from their sentences; here the length comes
first. The answers, the last 30 % of each chat, are what is trained.
"""

import hashlib
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import SYSTEM, sentences  # noqa: E402  # the line above finds it
from studio.disk import Home  # noqa: E402
from studio.domain.openai_messages import from_openai  # noqa: E402

MEAN_TOKENS, SIGMA, LONGEST = 600, 0.8, 2048
SHARE_TRAINED = 0.3
# What the chat template puts around a message.
_FRAME_TOKENS = 8


def chats(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield chats whose lengths in tokens are log-normal and whose answers are their last third.

    Args:
        tokenizer: Counts the tokens of a sentence.
        count: How many.
        seed: The same seed gives the same chats.
    """
    random_ = random.Random(seed)
    known = sentences(random_)
    sizes = [len(each.ids) for each in tokenizer.encode_batch([f" {text}" for text in known])]
    middle = math.log(MEAN_TOKENS) - SIGMA**2 / 2

    def text(num_tokens: float) -> str:
        parts, size = list[str](), 0
        while not parts or size < num_tokens:
            chosen = random_.randrange(len(known))
            # The last sentence that would make it longer by more than half is left out.
            if parts and size + sizes[chosen] / 2 > num_tokens:
                break
            parts.append(known[chosen])
            size += sizes[chosen]
        return " ".join(parts)

    for _ in range(count):
        length = min(random_.lognormvariate(middle, SIGMA), LONGEST - 100)
        messages = []
        if random_.random() < 0.5 and length > 250:
            messages.append({"role": "system", "content": random_.choice(SYSTEM)})
            length -= len(tokenizer.encode(messages[0]["content"]).ids) + _FRAME_TOKENS
        # One question, one answer: some templates make an example of each answer of a chat.
        room = length - 2 * _FRAME_TOKENS
        for role, share in (("user", 1 - SHARE_TRAINED), ("assistant", SHARE_TRAINED)):
            messages.append({"role": role, "content": text(room * share)})
        yield {"messages": messages}


def store(home: Home, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write chats as a Dataset of a home folder."""
    content = b"".join(from_openai(dict(record)).to_line() for record in records)
    path = home.dataset(hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return path
