"""Put the pictures that a record names beside its messages at their places in the text."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from studio.domain.conversation import Image, Message
from studio.domain.strict_json import RecordError
from studio.intake.formats import PICTURES

# The mark of LLaVA, LLaMA-Factory and ms-swift.
MARK = "<image>"
_PART = ("image", "image_url", "input_image")


def pictures_of(value: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the name of the field and the references of the pictures that a record names.

    Raises:
        RecordError: It holds a picture instead of naming it, or a video or sound.
    """
    name = next((name for name in PICTURES if value.get(name)), "")
    if not name:
        return "", []
    if not name.startswith("image"):
        raise RecordError(name, str(value[name])[:80], "videos and sounds are not read")
    items = value[name] if isinstance(value[name], list) else [value[name]]
    return name, [_reference(item, f"{name}[{index}]") for index, item in enumerate(items)]


def _reference(item: object, path: str) -> str:
    ref = (item.get("url") or item.get("path")) if isinstance(item, dict) else item
    if isinstance(item, dict) and item.get("bytes"):
        raise RecordError(path, sorted(item), "a picture is named by path or address, not held")
    if not isinstance(ref, str) or not ref:
        raise RecordError(path, str(item)[:80], "path or address of a picture is expected")
    return ref


def place_pictures(value: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return messages whose marks `<image>` are the pictures of the record, in their order.

    Raises:
        RecordError: There are more or fewer marks than pictures.
    """
    name, refs = pictures_of(value)
    if not refs:
        return messages
    marks = sum(message.content.count(MARK) for message in messages if message.role == "user")
    if marks != len(refs):
        reason = f"{len(refs)} pictures are named, and {marks} marks {MARK} stand in the questions"
        raise RecordError(name, len(refs), reason)
    left = iter(refs)
    return tuple(
        _placed(message, left) if message.role == "user" else message for message in messages
    )


def _placed(message: Message, refs: Iterator[str]) -> Message:
    first, *others = message.content.split(MARK)
    text, images = first, []
    for piece in others:
        images.append(Image(at=len(text), ref=next(refs)))
        text += piece
    return msgspec.structs.replace(message, content=text, images=tuple(images))


def fill_parts(value: dict[str, Any], messages: list[object]) -> list[object]:
    """Return OpenAI messages in which the pictures of the record stand in their content.

    They are the parts `{"type": "image"}` that name none, as TRL has them, or the marks `<image>`.

    Raises:
        RecordError: There are more or fewer places than pictures.
    """
    name, refs = pictures_of(value)
    if not refs:
        return messages
    places = sum(_num_places(message) for message in messages)
    if places != len(refs):
        reason = f"{len(refs)} pictures are named, and the messages have {places} places for them"
        raise RecordError(name, len(refs), reason)
    left = iter(refs)
    return [_filled(message, left) for message in messages]


def _content(message: object) -> object:
    if not isinstance(message, dict) or message.get("role") != "user":
        return None
    return message.get("content")


def _is_open(part: object) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in _PART
        and not (part.get("image") or part.get("image_url"))
    )


def _num_places(message: object) -> int:
    content = _content(message)
    if isinstance(content, str):
        return content.count(MARK)
    return sum(map(_is_open, content)) if isinstance(content, list) else 0


def _filled(message: object, refs: Iterator[str]) -> object:
    content = _content(message)
    parts: Sequence[object] = content if isinstance(content, list) else []
    if isinstance(content, str) and MARK in content:
        pieces = content.split(MARK)
        parts = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts = [*parts, {"type": "image"}, {"type": "text", "text": piece}]
    if not isinstance(message, dict) or not parts:
        return message
    filled = [{"type": "image", "image": next(refs)} if _is_open(part) else part for part in parts]
    return {**message, "content": [part for part in filled if part != {"type": "text", "text": ""}]}
