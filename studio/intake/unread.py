"""Name the fields of OpenAI messages that nothing reads, so that nobody believes they are trained."""

from collections.abc import Mapping
from typing import Any

RECORD_FIELDS = frozenset(("messages", "tools"))
MESSAGE_FIELDS = frozenset(
    (
        *("role", "content", "reasoning_content", "tool_calls", "tool_call_id"),
        *("name", "weight", "function_call"),
    )
)
_PART_FIELDS = frozenset(("type", "text", "image", "image_url"))


def unread_fields(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the paths of the fields that `from_openai` passes over, as in `messages[].id`."""
    unread = {key for key in record if key not in RECORD_FIELDS}
    for message in _objects(record.get("messages")):
        unread.update(f"messages[].{key}" for key in message if key not in MESSAGE_FIELDS)
        for part in _objects(message.get("content")):
            unread.update(f"messages[].content[].{key}" for key in part if key not in _PART_FIELDS)
    return frozenset(unread)


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
