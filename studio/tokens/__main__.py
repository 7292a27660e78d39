"""The process that renders foreign chat templates: limited, and alone.

    python -m studio.tokens shard ORDER.json INDEX   one shard of the token cache
    python -m studio.tokens inspect                  one conversation a line, for the inspector

Both speak JSON lines on standard output and end when their standard input is closed.
Exit code 0: done; 64: what the user gave is wrong; 1: any other failure, said as {"error": ...}.
"""

import json
import sys
from pathlib import Path
from typing import Any

from studio.errors import InputError, StudioError
from studio.tokens import inspect, shard
from studio.tokens.children import error_values
from studio.tokens.limits import MEMORY_BYTES, end_with_starter, limit_memory, memory_words

EXIT_INPUT = 64  # EX_USAGE of sysexits.h


def main(arguments: list[str]) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    try:
        if arguments[:1] == ["shard"]:
            _shard(Path(arguments[1]), int(arguments[2]))
        else:
            limit_memory(MEMORY_BYTES)
            inspect.serve(sys.stdin.buffer, _say)
    except StudioError as error:
        _say({"error": error_values(error)})
        return EXIT_INPUT if isinstance(error, InputError) else 1
    except MemoryError:
        _say({"error": error_values(InputError(*memory_words(MEMORY_BYTES))), "ends": True})
        return EXIT_INPUT
    return 0


def _shard(order_file: Path, index: int) -> None:
    end_with_starter()
    order = shard.ShardOrder.model_validate_json(order_file.read_text(encoding="utf-8"))
    limit_memory(order.memory_bytes)
    report = shard.make_shard(order, order_file.parent, index, _say)
    _say({"done": report.model_dump(mode="json")})


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
