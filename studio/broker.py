"""The embedded message broker: a transport of kombu whose queue is a folder (studio.spool).

kombu has one of its own. It ends a worker, and every run with it, for one message file that it
cannot read, runs messages out of order after a reboot, and loses what a killed worker had taken
(measured with kombu 5.7). Here a message is written whole, one that is being worked on outlives
its worker, and one that nobody can read is put aside.

Not covered: remote control and other broadcasts. Bells are the only messages.
"""

import json
import logging
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Annotated, Any, Literal

from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.utils.json import dumps
from pydantic import BaseModel, BeforeValidator, Json

from studio.errors import MachineError
from studio.spool import Spool

logger = logging.getLogger(__name__)

TRANSPORT = "studio.broker:Transport"
RESTORE_SECONDS = 2.0


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


class QoS(virtual.QoS):
    """What was delivered and not acknowledged: it lies in flight until then.

    The delivery tag of a message is its name in flight. Tags come from any thread.
    """

    def ack(self, delivery_tag: str) -> None:
        """Forget a message that was worked on."""
        self.channel.spool.finish(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a message that nobody wants, or let it wait again."""
        if not requeue:
            self.channel.spool.finish(delivery_tag)
        super().reject(delivery_tag, requeue=requeue)


class Channel(virtual.Channel):
    """A channel whose queues are one folder."""

    QoS = QoS

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.spool = Spool(Path(connection.client.transport_options["folder"]))
        self._restore_at = 0.0
        self._is_failing = False

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], *args: Any, **options: Any
    ) -> None:
        """Deliver messages to `callback`; who never acknowledges has done so on receipt."""

        def receive(message: Any) -> Any:
            self.spool.finish(message.delivery_tag)
            return callback(message)

        super().basic_consume(queue, no_ack, receive if no_ack else callback, *args, **options)

    def close(self) -> None:
        """Give back what is not acknowledged, and close."""
        super().close()
        self.spool.close()

    # kombu's parents call the second argument message, payload or otherwise.
    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        """Write one message so that no reader sees half of it."""
        try:
            self.spool.put(queue, dumps(payload))
        except MachineError as error:
            raise ChannelError(error.message) from error

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        """Return the oldest message that can be read.

        Raises:
            Empty: There is none, or the folder cannot be read now.
        """
        try:
            payload = self._next(queue)
        except OSError as error:
            # The disk may be there again at the next look; a worker does not end for that.
            if not self._is_failing:
                logger.error("the folder of messages cannot be used: %s", error)
            self._is_failing = True
            raise Empty from error
        self._is_failing = False
        if payload is None:
            raise Empty
        return payload

    def _next(self, queue: str) -> dict[str, Any] | None:
        if time.monotonic() >= self._restore_at:
            self._restore_at = time.monotonic() + RESTORE_SECONDS
            if count := self.spool.restore():
                logger.info("%d messages of a dead worker wait again", count)
        for name in self.spool.waiting(queue):
            taken = self.spool.take(name)
            if taken is None:
                continue
            try:
                payload: dict[str, Any] = json.loads(self.spool.read(taken))
                _Message.model_validate(payload)
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, RecursionError, OSError) as error:
                self.spool.bury(taken)
                reason = " ".join(str(error).split())
                logger.warning("the message %s cannot be read, put aside: %.200s", name, reason)
            else:
                payload["properties"]["delivery_tag"] = taken
                return payload
        return None

    def _restore(self, message: Any) -> None:
        """Let a message wait again that was delivered and not acknowledged."""
        self.spool.give_back(message.delivery_tag)

    def _size(self, queue: str) -> int:
        """Return how many messages of a queue wait."""
        return len(self.spool.waiting(queue))

    def _purge(self, queue: str) -> int:
        """Remove the messages of a queue that wait, and return how many there were."""
        taken = [self.spool.take(name) for name in self.spool.waiting(queue)]
        mine = [name for name in taken if name is not None]
        for name in mine:
            self.spool.finish(name)
        return len(mine)


class Transport(virtual.Transport):
    """The transport of the channel above: polled, and without a server."""

    Channel = Channel
    driver_type = "folder"
    driver_name = "folder"

    def driver_version(self) -> str:
        """Say which version of a driver is used: there is no driver."""
        return "N/A"
