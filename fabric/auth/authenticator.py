"""One question for both kinds of credential: who calls?"""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor

from fabric.auth.globus import RETRY_AFTER_S, GlobusTokens
from fabric.auth.identity import Identity
from fabric.auth.keys import Keys
from fabric.auth.rules import Rulebook
from fabric.errors import AuthUnavailable, ProjectForeign
from fabric.sql import Offload

OUR_PREFIXES = ("fab_", "fabl_", "fabt_")
"""Keys, launch tokens and tickets begin so; none of them is shown to Globus."""
NUM_THREADS = 4
MAX_WAITING = 64
"""How many tokens may wait for Globus' answer; more are told to come back."""


class Authenticator:
    """Says who calls, for callers on an event loop, which it never blocks.

    What begins as our own secrets do can only be an API key; anything else is a Globus token, if
    the hub knows any.

    Args:
        keys: API keys.
        offload: Runs what asks the database.
        tokens: Globus logins, if the hub takes them.
        rules: Tells when what is known of keys is old; by default it reads them for itself.
    """

    def __init__(
        self,
        keys: Keys,
        offload: Offload,
        tokens: GlobusTokens | None = None,
        *,
        rules: Rulebook | None = None,
    ) -> None:
        self._keys = keys
        self._offload = offload
        self._tokens = tokens
        self._rules = rules or Rulebook(offload)
        self._version = -1
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="globus-auth")
        self._asking: dict[tuple[str, str | None], asyncio.Future[Identity]] = {}

    async def identify(self, bearer: str | None, project: str | None = None) -> Identity:
        """Return who calls.

        Args:
            bearer: The credential, as it follows ``Bearer`` in the header.
            project: For whom the caller acts, where there is a choice.

        Raises:
            AuthError: There is no valid credential, or it is not the project's.
        """
        await self._keep_up()
        if bearer and self._tokens is not None and not bearer.startswith(OUR_PREFIXES):
            identity = self._tokens.recall(bearer, project)
            return identity or await self._ask(self._tokens, bearer, project)
        identity = self._keys.recall(bearer) if bearer else None
        if identity is None:
            identity = await self._offload(self._keys.authenticate, bearer)
        if project is not None and project != identity.project:
            raise ProjectForeign(project=project)
        return identity

    def close(self) -> None:
        """End the threads and the connections to Globus. Calling it twice is harmless."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._tokens is not None:
            self._tokens.close()

    async def _keep_up(self) -> None:
        """Ask the database about callers anew if another process may have changed something."""
        version = (await self._rules.current()).version
        if version != self._version:
            self._version = version
            self._keys.forget()
            if self._tokens is not None:
                self._tokens.recheck()

    async def _ask(self, tokens: GlobusTokens, bearer: str, project: str | None) -> Identity:
        """Ask Globus once for all requests that come with the same token at the same time."""
        key = (hashlib.sha256(bearer.encode()).hexdigest(), project)
        asking = self._asking.get(key)
        if asking is None:
            if len(self._asking) >= MAX_WAITING:
                raise AuthUnavailable(
                    reason="too many callers wait for its answer", retry_after_s=RETRY_AFTER_S
                )
            asking = asyncio.get_running_loop().run_in_executor(
                self._threads, tokens.authenticate, bearer, project
            )
            self._asking[key] = asking
            asking.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(asking)

    def _forget(self, key: tuple[str, str | None], done: asyncio.Future[Identity]) -> None:
        del self._asking[key]
        if not done.cancelled():
            # Callers that hung up do not read the error; it is none of the loop's.
            done.exception()
