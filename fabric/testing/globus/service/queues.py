"""The stand-in's side of RabbitMQ: exchanges, queues, accounts, and threads that consume.

Everyone else may only what their account allows: a user endpoint reads its own tasks and sends
results and heartbeats under its own key; a user reads the results of their own task groups.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError

from fabric.testing.globus.rabbit import BrokerAddress

logger = logging.getLogger(__name__)

EXCHANGES = ("tasks", "results", "heartbeats", "commands", "taskgroups")
ATTEMPTS = 30
BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message on its way to an exchange under a key."""

    exchange: str
    key: str
    body: bytes
    properties: dict[str, Any]


class Queues:
    """The service's connection to the broker; any thread may use it.

    Args:
        broker: Where RabbitMQ is.
    """

    def __init__(self, broker: BrokerAddress) -> None:
        self._broker = broker
        self._lock = threading.Lock()
        self._channel: BlockingChannel | None = None
        self._closing = threading.Event()
        self._accounts: set[str] = set()
        self._management = httpx.Client(
            base_url=broker.management_url,
            auth=(broker.user, broker.password),
            timeout=30,
            trust_env=False,
        )

    def start(self) -> None:
        """Declare what every endpoint shares."""

        def declare(channel: BlockingChannel) -> None:
            for exchange in EXCHANGES:
                channel.exchange_declare(exchange, "topic", durable=True)
            for queue in ("results", "heartbeats"):
                channel.queue_declare(queue, durable=True)
                channel.queue_bind(queue, queue, "#")

        self._call(declare)

    def close(self) -> None:
        """Stop consuming; connections end with the process."""
        self._closing.set()
        self._management.close()

    def declare(self, queue: str, exchange: str, key: str, *, kept_ms: int | None = None) -> None:
        """Make a durable queue for what is sent to an exchange under a key.

        Args:
            queue: The queue.
            exchange: The exchange.
            key: The key.
            kept_ms: How long an unread message is kept; for ever when ``None``.
        """
        arguments = {} if kept_ms is None else {"x-message-ttl": kept_ms}

        def declare(channel: BlockingChannel) -> None:
            channel.queue_declare(queue, durable=True, arguments=arguments)
            channel.queue_bind(queue, exchange, key)

        self._call(declare)

    def purge(self, queue: str) -> None:
        """Drop what waits in a queue."""
        self._call(lambda channel: channel.queue_purge(queue))

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages, all or none; they are safe in the broker when this returns."""
        outgoing = list(messages)

        def send(channel: BlockingChannel) -> None:
            for message in outgoing:
                _publish(channel, message)
            channel.tx_commit()

        self._call(send)

    def allow(self, user: str, secret: str, *, reads: str, writes: dict[str, str]) -> str:
        """Give an account its rights, and return its URL.

        Args:
            user: The account.
            secret: Its password.
            reads: A pattern of the queues it may consume.
            writes: The one key it may send under, by exchange.
        """
        if user not in self._accounts:
            name = quote(user)
            pattern = f"^({'|'.join(writes)})$" if writes else "^$"
            self._put(f"/users/{name}", {"password": secret, "tags": ""})
            rights = {"configure": "^$", "write": pattern, "read": reads}
            self._put(f"/permissions/%2F/{name}", rights)
            for exchange, key in writes.items():
                topic = {"exchange": exchange, "write": f"^{re.escape(key)}$", "read": "^$"}
                self._put(f"/topic-permissions/%2F/{name}", topic)
            self._accounts.add(user)
        return self._broker.amqp_url(user, secret)

    def consume(self, queue: str, handle: Callable[[bytes, str, bool], list[Outgoing]]) -> None:
        """Hand every message of a queue to ``handle``, in a thread that lasts as we do.

        Args:
            queue: The queue.
            handle: Called with the body, the key, and whether the message came before; what it
                returns is sent in one transaction with the acknowledgement.
        """
        threading.Thread(
            target=self._consume_always, args=(queue, handle), name=queue, daemon=True
        ).start()

    def _consume_always(
        self, queue: str, handle: Callable[[bytes, str, bool], list[Outgoing]]
    ) -> None:
        while not self._closing.is_set():
            try:
                self._consume(queue, handle)
            except AMQPError as error:
                logger.warning("Consuming %s again after: %r", queue, error)
                self._closing.wait(0.5)

    def _consume(self, queue: str, handle: Callable[[bytes, str, bool], list[Outgoing]]) -> None:
        channel = self._connect()
        channel.basic_qos(prefetch_count=2 * BATCH)
        uncommitted = 0
        for method, _, body in channel.consume(queue):
            for message in handle(body, method.routing_key, method.redelivered):
                _publish(channel, message)
            channel.basic_ack(method.delivery_tag)
            uncommitted += 1
            if uncommitted == BATCH or not channel.get_waiting_message_count():
                channel.tx_commit()
                uncommitted = 0

    def _connect(self) -> BlockingChannel:
        parameters = pika.URLParameters(f"{self._broker.amqp_url()}?heartbeat=0")
        channel = pika.BlockingConnection(parameters).channel()
        channel.tx_select()
        return channel

    def _call(self, action: Callable[[BlockingChannel], object]) -> None:
        """Act on the one channel, on a new one as long as the broker is away."""
        with self._lock:
            for attempt in range(ATTEMPTS):
                try:
                    if self._channel is None:
                        self._channel = self._connect()
                    action(self._channel)
                except AMQPError:
                    with suppress(AMQPError):
                        if self._channel is not None and self._channel.connection.is_open:
                            self._channel.connection.close()
                    self._channel = None
                    if attempt == ATTEMPTS - 1 or self._closing.wait(1.0):
                        raise
                else:
                    return

    def _put(self, path: str, document: dict[str, str]) -> None:
        for _ in range(ATTEMPTS):
            with suppress(httpx.TransportError):
                self._management.put(path, json=document).raise_for_status()
                return
            if self._closing.wait(1.0):
                break
        raise ConnectionError(f"RabbitMQ's management API took no {path}")


def _publish(channel: BlockingChannel, message: Outgoing) -> None:
    properties = pika.BasicProperties(delivery_mode=2, **message.properties)
    channel.basic_publish(message.exchange, message.key, message.body, properties, mandatory=True)
