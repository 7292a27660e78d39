"""Made-up chats in OpenAI's form, as much of them as a benchmark asks for; same seed, same bytes.

    python benchmarks/chats.py PATH --megabytes 100 --seed 0

The shape is that of common instruction data: lengths are log-normal (a long tail of long answers),
half have a system prompt, a third several turns, 5 % call tools whose schemas repeat, some think
before they answer (in a field of its own or in tags), some are not English. No two are the same.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 4000
SENTENCES = 3000
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu an er in or ut".split()
OTHER_SCRIPTS = (
    "Prüfen Sie bitte zuerst die Höhe der Flut.",
    "潮位は六時に最も高くなります。",
    "Прилив начнётся около шести часов.",
    "La marée est haute à dix-huit heures.",
    "يبدأ المد في السادسة مساء.",
    "That is great 🌊👍",
)
CODE = 'def tide(at: str) -> float:\n\t"""Return the height."""\n\treturn TABLE[at] / 100\n'
SYSTEM = tuple(
    f"You are assistant number {n}. Answer briefly, say so when you do not know, and never guess."
    for n in range(20)
)


def tool_schema(number: int) -> dict[str, Any]:
    """Return one of the schemas that conversations with tools share."""
    return {
        "type": "function",
        "function": {
            "name": f"look_up_{number}",
            "description": f"Look a value up in table {number}.",
            "parameters": {
                "type": "object",
                "properties": {
                    "key": {"type": "string", "description": "What is looked up."},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
                },
                "required": ["key"],
            },
        },
    }


TOOLS = tuple(tool_schema(number) for number in range(8))


def sentences(random_: random.Random) -> list[str]:
    """Return sentences of made-up words, of which the first are used far more than the last."""
    words = [
        "".join(random_.choices(SYLLABLES, k=random_.randint(1, 4))) for _ in range(VOCABULARY)
    ]
    weights = [1 / (rank + 2) for rank in range(VOCABULARY)]
    made = []
    for _ in range(SENTENCES):
        chosen = random_.choices(words, weights, k=random_.randint(4, 22))
        made.append(" ".join(chosen).capitalize() + random_.choice((".", ".", ".", "?", "!", ":")))
    return made


class Chats:
    """An endless source of chats.

    Args:
        seed: The same seed gives the same chats.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._sentences = sentences(self._random)
        self._number = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield records of OpenAI messages."""
        while True:
            yield self.chat()

    def chat(self) -> dict[str, Any]:
        """Return the next chat."""
        chance = self._random.random
        self._number += 1
        messages: list[dict[str, Any]] = []
        record: dict[str, Any] = {"messages": messages}
        if chance() < 0.5:
            messages.append({"role": "system", "content": self._random.choice(SYSTEM)})
        has_tools = chance() < 0.05
        if has_tools:
            record["tools"] = self._random.sample(TOOLS, self._random.randint(1, 3))
        for turn in range(1 if chance() < 0.67 else self._random.randint(2, 6)):
            ask = self.text(1.0)
            messages.append(
                {"role": "user", "content": f"{ask} [{self._number}]" if turn == 0 else ask}
            )
            if has_tools:
                messages += self.call(record["tools"][0])
            messages.append(self.answer())
        if chance() < 0.02:
            record["id"] = f"chat-{self._number}"
        return record

    def text(self, scale: float) -> str:
        """Return a text whose number of sentences is log-normal, about `3 * scale` at its middle."""
        count = 1 + int(self._random.lognormvariate(1.1, 0.8) * scale)
        parts = self._random.choices(self._sentences, k=count)
        luck = self._random.random()
        if luck < 0.04:
            parts.insert(count // 2, self._random.choice(OTHER_SCRIPTS))
        elif luck < 0.08:
            parts.insert(count // 2, f"\n```python\n{CODE}```\n")
        return ("\n\n" if luck > 0.8 else " ").join(parts)

    def answer(self) -> dict[str, Any]:
        """Return an assistant's message, sometimes with thinking."""
        content = self.text(3.0)
        luck = self._random.random()
        if luck < 0.05:
            return {"role": "assistant", "reasoning_content": self.text(6.0), "content": content}
        if luck < 0.08:
            content = f"<think>\n{self.text(6.0)}\n</think>\n\n{content}"
        return {"role": "assistant", "content": content}

    def call(self, tool: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a call of a tool and its result."""
        number = f"call_{self._random.getrandbits(48):x}"
        arguments = json.dumps({"key": self._random.choice(self._sentences), "limit": 10})
        function = {"name": tool["function"]["name"], "arguments": arguments}
        call = {"id": number, "type": "function", "function": function}
        return [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": number, "content": self.text(1.0)},
        ]


def write_chats(path: Path, num_bytes: int, seed: int) -> int:
    """Write chats as JSON lines until the file has at least `num_bytes`.

    Args:
        path: The file; replaced when it is there.
        num_bytes: Size wanted, in bytes; the last chat may go over it.
        seed: Seed of the content.

    Returns:
        The number of chats.
    """
    written = count = 0
    with path.open("wb", buffering=2**20) as file:
        for chat in Chats(seed):
            # One in five files in the wild escapes what is not ASCII; here one chat in five.
            line = json.dumps(chat, ensure_ascii=count % 5 == 0).encode("utf-8") + b"\n"
            written += file.write(line)
            count += 1
            if written >= num_bytes:
                return count
    raise AssertionError("the chats never end")


def main() -> None:
    """Write a file of chats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_chats(given.path, int(given.megabytes * 1e6), given.seed)


if __name__ == "__main__":
    main()
