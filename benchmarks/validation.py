"""Validate a file of chats on one core: ours beside `datasets` and a Python loop of the same checks.

    python benchmarks/validation.py [--megabytes 100] [--rounds 3] [--gb]

First the gate: in a file with planted faults both sides must find the same records at fault, each
for the same reason. Then each side reads the same file in a process of its own, pinned to one core,
the sides in turn. Time is that of the whole process without its imports, memory its peak. The
other side is `load_dataset("json")`, which cannot tell lines that are not JSON (it ends at them), and
then one plain loop over the rows; its cache is a new folder each time.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import Chats, write_chats  # noqa: E402  # the line above finds it

ROLES = ("system", "developer", "user", "assistant", "tool")
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
KEYS = ("seconds", "cpu")


# ---- the other side ---------------------------------------------------------------------------


def theirs(path: Path) -> set[tuple[int, str]]:
    """Return number and fault of each record that `datasets` and a loop of checks find wrong."""
    import datasets  # this side alone pays for it

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        rows = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=False
        )
        found = set()
        for number, row in enumerate(rows, 1):
            for fault in faults(row):
                found.add((number, fault))
        return found


def faults(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a row, by the rules of studio.domain.validation."""
    messages = row["messages"]
    found = check_fields(messages)
    if found:
        return found
    tools = row.get("tools") or ()
    found += check_turns(messages) + check_calls(messages, tools)
    written = json.dumps(tools) if tools else ""
    if any(map(has_control_token, messages)) or any(t in written for t in CONTROL_TOKENS):
        found.append("control_token")
    return found


def check_calls(messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """Return what is wrong with calls and their results."""
    found = []
    declared = {tool["function"]["name"] for tool in tools}
    known: set[str | None] = set()
    waiting: list[str | None] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if message["role"] == "tool":
            id_ = message.get("tool_call_id")
            if not known or (id_ is not None and id_ not in known):
                found.append("tool_result")
            elif id_ in waiting:
                waiting.remove(id_)
            continue
        if waiting:
            found.append("tool_call")
        waiting = [call.get("id") for call in calls]
        known.update(waiting)
        if declared and any(call["function"]["name"] not in declared for call in calls):
            found.append("tool_undeclared")
    if waiting and messages[-1]["role"] == "tool":
        found.append("tool_call")
    return found


def check_fields(messages: Any) -> list[str]:
    """Return what is wrong with the form of messages."""
    if not isinstance(messages, list) or not messages:
        return ["record"]
    for message in messages:
        if message.get("role") not in ROLES:
            return ["role"]
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str | list) and not (
            content is None and message["role"] == "assistant" and calls
        ):
            return ["record" if content is None else "content"]
        if message.get("weight") not in (None, 0, 1):
            return ["weight"]
        for call in calls or ():
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except ValueError:
                return ["tool_arguments"]
            if not isinstance(arguments, dict):
                return ["tool_arguments"]
    return []


def check_turns(messages: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with who speaks when."""
    found = []
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        found.append("no_assistant")
    elif all(message.get("weight") == 0 for message in answers):
        found.append("weight")
    if not any(message["role"] == "user" for message in messages):
        found.append("no_user")
    if any(not (a["content"] or "").strip() and not a.get("tool_calls") for a in answers):
        found.append("empty_answer")
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer"):
            if index > 0:
                found.append("system")
            continue
        if (role == "assistant" and not before) or (role == before and role != "tool"):
            found.append("alternation")
        before = role
    return found


def has_control_token(message: dict[str, Any]) -> bool:
    """Tell whether a control token stands in what a template writes of a message."""
    texts = [message["content"] or "", message.get("reasoning_content") or ""]
    for call in message.get("tool_calls") or ():
        texts += [call["function"]["name"], call["function"]["arguments"]]
    return any("<|" in text and any(t in text for t in CONTROL_TOKENS) for text in texts)


# ---- our side ---------------------------------------------------------------------------------


def ours(path: Path) -> set[tuple[int, str]]:
    """Return number and fault of each record that we find wrong, notes left out."""
    from studio.intake.read import check_file  # this side alone pays for it

    issues = check_file(path).issues
    return {(issue.line, issue.kind) for issue in issues if issue.severity != "note"}


SIDES: dict[str, Callable[[Path], set[tuple[int, str]]]] = {"ours": ours, "datasets": theirs}


# ---- the gate ---------------------------------------------------------------------------------


def plant(path: Path, seed: int) -> set[tuple[int, str]]:
    """Write chats of which some have a fault; return number and kind of each."""
    random_ = random.Random(seed)
    planted: set[tuple[int, str]] = set()
    kinds = list(PLANTS)
    with path.open("w", encoding="utf-8") as file:
        for number, chat in enumerate(islice(Chats(seed), 400), 1):
            # No more than twenty of a kind, as many as the Report keeps in full.
            if number % 4 == 0 and "tools" not in chat:
                kind = kinds[len(planted) % len(kinds)]
                PLANTS[kind](chat["messages"], random_)
                planted.add((number, kind))
            file.write(json.dumps(chat) + "\n")
    return planted


def first(messages: list[dict[str, Any]], role: str) -> int:
    """Return the place of the first message of a role."""
    return next(index for index, message in enumerate(messages) if message["role"] == role)


def calling(arguments: str) -> dict[str, Any]:
    """Return an assistant's message with a call."""
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def put(messages: list[dict[str, Any]], speaker: str, **fields: object) -> None:
    """Change the first message of a role."""
    messages[first(messages, speaker)].update(fields)


def remove_answers(messages: list[dict[str, Any]], _: random.Random) -> None:
    """Leave what comes before the first answer."""
    del messages[first(messages, "assistant") :]


PLANTS: dict[str, Callable[[list[dict[str, Any]], random.Random], object]] = {
    "role": lambda m, r: put(m, "user", role=r.choice(("bot", "User", "human"))),
    "content": lambda m, _: put(m, "user", content=5),
    "record": lambda m, _: put(m, "user", content=None),
    "weight": lambda m, _: put(m, "assistant", weight=2),
    "no_assistant": remove_answers,
    "empty_answer": lambda m, _: put(m, "assistant", content=" \n"),
    "system": lambda m, _: m.append({"role": "system", "content": "Be brief."}),
    "alternation": lambda m, _: m.append(dict(m[-1])),
    "tool_result": lambda m, _: m.append({"role": "tool", "content": "x", "tool_call_id": "y"}),
    "tool_call": lambda m, _: m.extend(({"role": "user", "content": "?"}, calling("{}"), *m[-2:])),
    "tool_arguments": lambda m, _: m.extend(({"role": "user", "content": "?"}, calling("{a"))),
    "control_token": lambda m, r: put(m, "assistant", content=f"a{r.choice(CONTROL_TOKENS)}b"),
}


# ---- measuring --------------------------------------------------------------------------------


def child(side: str, path: Path) -> None:
    """Measure one side in this process and print seconds, peak and what was found."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if side == "ours":
        import studio.intake.read  # noqa: F401  # imports are no part of the time
    else:
        import datasets  # noqa: F401
    start, cpu_start = time.perf_counter(), time.process_time()
    found = SIDES[side](path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"seconds": seconds, "cpu": cpu, "peak_mib": peak_mib, "found": sorted(found)}
    print(json.dumps(result))


def measure(side: str, path: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    answer = subprocess.run(
        [
            *("env", "HF_HUB_OFFLINE=1", f"HF_HOME={path.parent / 'home'}"),
            *(sys.executable, __file__, "--child", side, "--path", str(path)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def gate(folder: Path) -> int:
    """Check that both sides find the same planted faults; return how many there are."""
    path = folder / "planted.jsonl"
    planted = plant(path, seed=1)
    found = {side: {tuple(pair) for pair in measure(side, path)["found"]} for side in SIDES}
    missed = planted - found["ours"]
    if found["ours"] != found["datasets"] or missed:
        differences = sorted(found["ours"] ^ found["datasets"])
        raise SystemExit(f"The sides differ in {differences}; missed are {sorted(missed)}.")
    return len(found["ours"])


def compare(folder: Path, megabytes: float, rounds: int) -> None:
    """Time both sides in turn on one file, and print the medians and their ratio."""
    path = folder / "chats.jsonl"
    chats = write_chats(path, int(megabytes * 1e6), seed=0)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            results[side].append(measure(side, path))
    megabytes = path.stat().st_size / 1e6
    path.unlink()
    print(f"{megabytes:.0f} MB, {chats} chats, {rounds} rounds, one core")
    median: dict[str, dict[str, float]] = {}
    for side, runs in results.items():
        median[side] = {key: statistics.median(run[key] for run in runs) for key in KEYS}
        times = " ".join(f"{run['seconds']:.2f}" for run in runs)
        print(
            f"  {side:9} {median[side]['seconds']:7.2f} s ({times}), of it "
            f"{median[side]['cpu']:.2f} s on the processor, "
            f"{megabytes / median[side]['seconds']:.0f} MB/s, "
            f"peak {max(run['peak_mib'] for run in runs):.0f} MiB"
        )
    ratio, cpu = (median["datasets"][key] / median["ours"][key] for key in KEYS)
    print(f"  ratio {ratio:.1f} in time, {cpu:.1f} on the processor (goal: 5, under 400 MiB)")


def main() -> None:
    """Run the gate, then the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gb", action="store_true", help="measure 1 GB, too")
    parser.add_argument("--folder", type=Path, help="where files are made for a while")
    parser.add_argument("--child", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.path)
        return
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        print(f"gate: both sides find the same {gate(folder)} faults")
        compare(folder, given.megabytes, given.rounds)
        if given.gb:
            compare(folder, 1000, 1)


if __name__ == "__main__":
    main()
