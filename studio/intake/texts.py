"""What a record says, for those who compare and search."""

from collections.abc import Iterator, Sequence

import msgspec

from studio.domain.conversation import Conversation, Message, PlainText, Record


def visible_texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yield (role, text) of everything in a record that a person may look for."""
    if isinstance(record, PlainText):
        yield "", record.text
        return
    for message in messages_of(record):
        yield message.role, message.content
        if message.reasoning_content:
            yield message.role, message.reasoning_content
        for call in message.tool_calls:
            yield message.role, call.name
            yield message.role, msgspec.json.encode(call.arguments).decode("utf-8")
    for tool in record.tools:
        yield "system", msgspec.json.encode(tool).decode("utf-8")


def messages_of(record: Record) -> tuple[Message, ...]:
    """Return all messages of a record; those of a preference one after the other."""
    if isinstance(record, PlainText):
        return ()
    if isinstance(record, Conversation):
        return record.messages
    return record.messages + record.chosen + record.rejected


def texts_of(record: Record) -> tuple[str, str]:
    """Return what a record asks and what it answers.

    System messages are left out: one long prompt in every record would make all of them alike.
    """
    if isinstance(record, PlainText):
        return record.text, ""
    asked, answered = _sides(record.messages)
    if isinstance(record, Conversation):
        return asked, answered
    # What a preference shows the model first is its question, whoever spoke.
    chosen, rejected = (" ".join(_sides(part)) for part in (record.chosen, record.rejected))
    return f"{asked} {answered}", f"{chosen} {rejected}"


def _sides(messages: Sequence[Message]) -> tuple[str, str]:
    asked, answered = [], []
    for message in messages:
        if message.role == "assistant":
            if message.reasoning_content:
                answered.append(message.reasoning_content)
            answered.append(message.content)
            for call in message.tool_calls:
                arguments = msgspec.json.encode(call.arguments).decode("utf-8")
                answered.append(f"{call.name} {arguments}")
        elif message.role not in ("system", "developer"):
            asked.append(message.content)
    return " ".join(asked), " ".join(answered)
