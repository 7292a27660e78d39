"""The embedded message broker: kombu's folder transport, hardened.

Plain kombu 5.7 ends a worker, and every run with it, for one message file that it cannot read; a
power cut, a full disk or the sender's own open-then-write leaves such a file. Here a message is
written whole, and one that cannot be read is thrown away: the rows are the truth, and whoever
waits is rung for again.
"""

import logging
import time
import uuid
from base64 import b64decode
from pathlib import Path
from typing import Annotated, Any, Literal

from kombu.exceptions import ChannelError
from kombu.transport import filesystem
from kombu.utils.json import dumps
from pydantic import BaseModel, BeforeValidator, Json

from studio.disk import write_whole
from studio.errors import MachineError

logger = logging.getLogger(__name__)

TRANSPORT = "studio.broker:Transport"


class _Headers(BaseModel):
    task: str
    id: str


class _DeliveryInfo(BaseModel):
    exchange: str
    routing_key: str


class _Properties(BaseModel):
    delivery_tag: str
    delivery_info: _DeliveryInfo
    body_encoding: Literal["base64"]


class _Message(BaseModel):
    """What Celery reads of a message without asking whether it is there."""

    headers: _Headers
    properties: _Properties
    body: Annotated[
        Json[tuple[list[Any], dict[str, Any], dict[str, Any]]], BeforeValidator(b64decode)
    ]


class Channel(filesystem.Channel):
    """A channel that survives files which are no messages."""

    # kombu calls the second argument message in one parent and payload in the other.
    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        """Write one message so that no reader sees half of it."""
        name = f"{time.time_ns()}_{uuid.uuid4()}.{queue}.msg"
        try:
            write_whole(Path(self.data_folder_out) / name, dumps(payload))
        except MachineError as error:
            raise ChannelError(error.message) from error

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message that can be read.

        Raises:
            Empty: There is none.
        """
        while True:
            try:
                payload: dict[str, Any] = super()._get(queue)
                _Message.model_validate(payload)
            except (ValueError, TypeError, ChannelError) as error:
                reason = " ".join(str(error).split())
                logger.warning("a message that cannot be read was thrown away: %.200s", reason)
            else:
                return payload

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Note which queue an exchange feeds; a note that cannot be read is written anew."""
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except (ValueError, TypeError) as error:
            logger.warning("the broker's note on %s could not be read: %r", exchange, error)
            self._exchange_file(exchange).unlink(missing_ok=True)
            super()._queue_bind(exchange, routing_key, pattern, queue)


class Transport(filesystem.Transport):
    """kombu's folder transport with the channel above."""

    Channel = Channel
