"""Dials the hub and keeps dialling: the outbound session of an instance."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from fabric.errors import HubOutOfReach, SessionRefused
from fabric.messages.session import MAX_FRAME_BYTES

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
STEADY_S = 5.0
"""A session that lasted so long was a good one: the next delay starts small again."""

REFUSAL_CODES = {4401, 4409}
REFUSAL_STATUSES = {401, 403, 409}

_draw = random.Random()  # noqa: S311 - its own, so that nobody else's draws depend on it
logger = logging.getLogger(__name__)


async def dial(
    url: str,
    token: str,
    serve: Callable[[ClientConnection], Awaitable[None]],
    drain: asyncio.Event,
    *,
    join_s: float | None = None,
    on_failure: Callable[[str], None] = lambda _: None,
) -> None:
    """Keep a session with the hub until ``drain`` is set, redialling with jittered backoff.

    Args:
        url: The hub's session route, ``ws://…`` or ``wss://…``.
        token: The launch token.
        serve: Serves one connection until it has ended.
        drain: Ends the dialling.
        join_s: How long the first session may take to come about; ``None``: for ever.
        on_failure: Told why a session did not come about, or broke.

    Raises:
        SessionRefused: The hub does not want this instance; dialling again would not help.
        HubOutOfReach: There was no session within ``join_s``.
    """
    delay_s = FIRST_DELAY_S
    until = None if join_s is None else time.monotonic() + join_s

    async def serve_first(connection: ClientConnection) -> None:
        nonlocal until
        until = None
        await serve(connection)

    while not drain.is_set():
        began_at = time.monotonic()
        try:
            await _dial_once(url, token, serve_first)
        except (OSError, TimeoutError, InvalidHandshake) as error:
            reason = str(error) or type(error).__name__
            logger.warning("the hub cannot be reached: %s", reason)
            if until is not None and join_s is not None and time.monotonic() > until:
                raise HubOutOfReach(url=url, reason=reason, waited_s=join_s) from error
            on_failure(reason)
        if time.monotonic() - began_at > STEADY_S:
            delay_s = FIRST_DELAY_S
        with suppress(TimeoutError):
            # Jittered, because after a hub's restart all instances come at once.
            async with asyncio.timeout(_draw.uniform(0.5, 1.0) * delay_s):
                await drain.wait()
        delay_s = min(2 * delay_s, MAX_DELAY_S)


async def _dial_once(
    url: str, token: str, serve: Callable[[ClientConnection], Awaitable[None]]
) -> None:
    try:
        connection = await connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=MAX_FRAME_BYTES,
            close_timeout=1.0,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        if status in REFUSAL_STATUSES:
            raise SessionRefused(reason=f"it answered {status}") from error
        raise
    await serve(connection)
    if connection.close_code in REFUSAL_CODES:
        raise SessionRefused(reason=connection.close_reason or f"code {connection.close_code}")
