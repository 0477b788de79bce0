"""Both kinds of credential at one door, which stays open for others while Globus is slow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fabric.auth import Authenticator, GlobusTokens, Identity, Keys
from fabric.auth.authenticator import MAX_WAITING
from fabric.errors import (
    AuthUnavailable,
    KeyInvalid,
    KeyMissing,
    NotAMember,
    ProjectForeign,
    TokenExpired,
)
from fabric.sql import Database, Offload
from fabric.testing.globus.campus import Campus


@pytest.fixture
async def authenticator(database: Database, tokens: GlobusTokens) -> AsyncIterator[Authenticator]:
    offload = Offload(database)
    authenticator = Authenticator(Keys(database), offload, tokens)
    yield authenticator
    authenticator.close()
    offload.close()


async def test_key_and_token_are_told_apart(
    authenticator: Authenticator, database: Database, campus: Campus
) -> None:
    record, key = Keys(database).add_key("bio")
    by_key = await authenticator.identify(key)
    by_token = await authenticator.identify(campus.token(campus.alice))
    assert (by_key.key_id, by_key.project, by_key.user) == (record.id, "bio", None)
    assert (by_token.project, by_token.user) == ("astro", "alice@example.edu")
    assert await authenticator.identify(key, "bio") == by_key


async def test_refusals_say_which_kind_was_tried(
    authenticator: Authenticator, campus: Campus
) -> None:
    for bearer in (None, ""):
        with pytest.raises(KeyMissing):
            await authenticator.identify(bearer)
    with pytest.raises(KeyInvalid):
        await authenticator.identify("fab_000000000000_" + "x" * 43)
    assert campus.service.num_calls == {}
    with pytest.raises(TokenExpired):
        await authenticator.identify("Ag" + "0" * 92)
    with pytest.raises(NotAMember):
        await authenticator.identify(campus.token(campus.bob))


async def test_key_does_not_act_for_another_project(
    authenticator: Authenticator, database: Database
) -> None:
    _, key = Keys(database).add_key("bio")
    with pytest.raises(ProjectForeign, match="astro"):
        await authenticator.identify(key, "astro")


async def test_hub_without_globus_takes_keys_alone(database: Database, campus: Campus) -> None:
    offload = Offload(database)
    authenticator = Authenticator(Keys(database), offload)
    with pytest.raises(KeyInvalid):
        await authenticator.identify(campus.token(campus.alice))
    authenticator.close()
    offload.close()


async def test_many_requests_with_one_token_ask_globus_once(
    authenticator: Authenticator, campus: Campus
) -> None:
    token = campus.token(campus.alice)
    callers = await asyncio.gather(*(authenticator.identify(token) for _ in range(20)))
    assert len(set(callers)) == 1
    assert campus.service.num_calls["/v2/oauth2/token/introspect"] == 1


class Slow:
    """Globus logins that wait for an answer until they are let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def recheck(self) -> None:
        pass

    def recall(self, bearer: str, project: str | None) -> None:
        return None

    def authenticate(self, bearer: str, project: str | None) -> Identity:
        assert self.let_go.wait(20)
        raise TokenExpired

    def close(self) -> None:
        self.let_go.set()


async def test_slow_globus_keeps_nobody_else_waiting(
    database: Database, campus: Campus, groups: object
) -> None:
    slow: Any = Slow()
    offload = Offload(database)
    authenticator = Authenticator(Keys(database), offload, slow)
    _, key = Keys(database).add_key("bio")
    waiting = [
        asyncio.create_task(authenticator.identify(f"token-{n}")) for n in range(MAX_WAITING)
    ]
    await asyncio.sleep(0)
    assert (await authenticator.identify(key)).project == "bio"
    with pytest.raises(AuthUnavailable, match="too many"):
        await authenticator.identify("one-more-token")
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    slow.let_go.set()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError)
    assert all(isinstance(error, TokenExpired) for error in ended[1:])
    authenticator.close()
    offload.close()
