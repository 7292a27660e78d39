"""A record as people read it, as HTML: every text literally, none of it as markup."""

import json
from html import escape

from studio.domain.conversation import Conversation, Message, PlainText, Preference, Record

MAX_CHARACTERS = 20_000


def record(found: Record) -> str:
    """Return a record as bubbles, from its first message on."""
    if isinstance(found, PlainText):
        body = _bubble("text", "Text", found.text)
    elif isinstance(found, Conversation):
        body = _turns(found.messages)
    else:
        assert isinstance(found, Preference)
        body = (
            _turns(found.messages)
            + f'<div class="side"><b>Better</b>{_turns(found.chosen)}</div>'
            + f'<div class="side"><b>Worse</b>{_turns(found.rejected)}</div>'
        )
    return f'<div class="talk" tabindex="0" role="group" aria-label="conversation">{body}</div>'


def _turns(messages: tuple[Message, ...]) -> str:
    return "".join(_turn(message) for message in messages)


def _turn(message: Message) -> str:
    if message.role in ("system", "developer"):
        return _bubble("system", "System message", message.content)
    if message.role == "tool":
        return _bubble("result", "Result of the tool", message.content)
    found = ""
    if message.reasoning_content:
        found += _bubble("think", "Thinking", message.reasoning_content)
    images = "".join(f"\n[image: {image.ref[:80]}]" for image in message.images)
    if message.content or images:
        title = "User" if message.role == "user" else "Assistant"
        if message.weight == 0:
            title += " · not learned (weight 0)"
        found += _bubble(message.role, title, message.content + images)
    for call in message.tool_calls:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        found += _bubble("call", f"Calls {call.name}", arguments)
    return found


def _bubble(kind: str, title: str, text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    tail = f"<small>and {more:,} more characters</small>" if more > 0 else ""
    return (
        f'<div class="bubble {kind}"><b>{escape(title)}</b>'
        f"<div>{escape(text[:MAX_CHARACTERS])}</div>{tail}</div>"
    )
