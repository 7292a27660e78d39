"""Conversation: the one record shape; every format becomes it."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Kind(StrEnum):
    """What the records of a Dataset are."""

    CONVERSATIONS = "conversations"
    PREFERENCES = "preferences"
    TEXTS = "texts"


# msgspec's structs instead of pydantic's models: a Dataset of a gigabyte is a million of these, and
# decoding one into a struct takes a twentieth of the time. Values from outside come through
# `from_openai` or another converter, which check them.
class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    def to_line(self) -> bytes:
        """Return the canonical line with its line feed: same content, same bytes."""
        return _ENCODER.encode(self) + b"\n"

    def to_json(self) -> str:
        """Return the canonical line without its line feed."""
        return _ENCODER.encode(self).decode("utf-8")

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Parse a canonical line.

        Raises:
            msgspec.MsgspecError: It is none.
        """
        return msgspec.json.decode(line, type=cls)


class ToolCall(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One call of a function by the model. Arguments are an object, whatever form they came in."""

    id: str | None = None
    name: str
    arguments: dict[str, Any]


class Image(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A picture that a message shows, by reference; nothing fetches it.

    Attributes:
        at: Place in the message's content, in characters from its start.
        ref: Path, address or data URL, as the file has it.
    """

    at: int
    ref: str


class Message(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One message of a Conversation.

    Attributes:
        reasoning_content: What the assistant thought before it answered; an empty text is an
            empty think block, None is none.
        weight: 0 keeps an assistant's message in the context and out of the loss (OpenAI's field).
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: Literal[0, 1] = 1
    images: tuple[Image, ...] = ()

    def template_content(self) -> str | list[dict[str, str]]:
        """Return the content as chat templates read it: text, or parts where images are."""
        if not self.images:
            return self.content
        parts: list[dict[str, str]] = []
        at = 0
        for image in self.images:
            if image.at > at:
                parts.append({"type": "text", "text": self.content[at : image.at]})
            parts.append({"type": "image", "image": image.ref})
            at = image.at
        if at < len(self.content):
            parts.append({"type": "text", "text": self.content[at:]})
        return parts


Messages = Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]


class Conversation(_Record, frozen=True, forbid_unknown_fields=True):
    """Messages, and the function schemas that the model may call in them.

    Attributes:
        tags: Words that somebody put on it; no model reads them.
    """

    messages: Messages
    tools: tuple[dict[str, Any], ...] = ()
    tags: tuple[str, ...] = ()

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages in the shape that chat templates read."""
        messages = []
        for message in self.messages:
            # Templates of both families know no developer role; it is the newer name of system.
            role = "system" if message.role == "developer" else message.role
            values: dict[str, Any] = {"role": role, "content": message.template_content()}
            if message.reasoning_content is not None:
                values["reasoning_content"] = message.reasoning_content
            if message.tool_calls:
                values["tool_calls"] = [
                    {
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in message.tool_calls
                ]
            messages.append(values)
        return messages


class Preference(_Record, frozen=True, forbid_unknown_fields=True):
    """A prompt with a better and a worse continuation."""

    messages: tuple[Message, ...]
    chosen: Messages
    rejected: Messages
    tools: tuple[dict[str, Any], ...] = ()
    tags: tuple[str, ...] = ()


class PlainText(_Record, frozen=True, forbid_unknown_fields=True):
    """A text for continued pre-training."""

    text: str
    tags: tuple[str, ...] = ()


Record = Conversation | Preference | PlainText
RECORD_TYPES: Mapping[Kind, type[Record]] = {
    Kind.CONVERSATIONS: Conversation,
    Kind.PREFERENCES: Preference,
    Kind.TEXTS: PlainText,
}
_ENCODER = msgspec.json.Encoder()
