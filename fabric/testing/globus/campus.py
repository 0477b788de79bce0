"""A hub, an application, people and groups, registered at one Globus Auth of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from fabric.auth import GlobusTokens, Groups, Keys, Users
from fabric.sql import Database, utc_now
from fabric.testing.globus.auth import GROUPS_SCOPE, Account, AuthClient, AuthDirectory, Group
from fabric.testing.globus.serving import AuthService, running_auth


@dataclass(frozen=True, slots=True, kw_only=True)
class Campus:
    """What is registered.

    ``alice`` is a member of ``survey``, which anyone may see; ``bob`` is in no group; ``lab`` is
    private and empty.
    """

    service: AuthService
    directory: AuthDirectory
    hub: AuthClient
    app: AuthClient
    scope: str
    alice: Account
    bob: Account
    survey: Group
    lab: Group

    def token(self, account: Account, scope: str | None = None, *, server: str = "") -> str:
        """Return an access token, as the account's login would have got it."""
        return self.directory.issue(
            "access",
            account.id,
            self.app.id,
            scope or self.scope,
            resource_server=server or self.hub.id,
        ).value

    def add_groups(self, database: Database, *, survey: str = "astro", lab: str = "bio") -> Groups:
        """Give each group a project of a hub's database, which is made if need be."""
        groups, keys = Groups(database), Keys(database)
        known = {project.name for project in keys.projects()}
        for project, group in ((survey, self.survey), (lab, self.lab)):
            if project not in known:
                keys.add_project(project)
            groups.add(group.id, project, max_concurrent=3)
        return groups

    def get_tokens(
        self,
        groups: Groups,
        users: Users,
        *,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> GlobusTokens:
        """Return what takes logins at the hub."""
        assert self.hub.secret is not None
        return GlobusTokens(
            groups,
            users,
            client_id=self.hub.id,
            client_secret=self.hub.secret,
            scope=self.scope,
            clock=clock,
            monotonic=monotonic,
        )


@contextmanager
def running_campus(clock: Callable[[], float] = time.time) -> Iterator[Campus]:
    """Yield a campus whose Globus Auth and Groups serve until the end of the block.

    Args:
        clock: The service's clock, in epoch seconds.
    """
    directory = AuthDirectory(token_lifetime_s=3600, clock=clock)
    hub = directory.add_client("fabric hub")
    alice, bob = directory.add_user("alice@example.edu"), directory.add_user("bob@example.edu")
    survey = directory.add_group("Astro survey", visibility="authenticated")
    with running_auth(directory) as service:
        yield Campus(
            service=service,
            directory=directory,
            hub=hub,
            app=directory.add_native_client("fabric"),
            scope=directory.add_scope(hub, dependencies=[GROUPS_SCOPE]),
            alice=alice,
            bob=bob,
            survey=directory.add_member(survey, alice),
            lab=directory.add_group("Biology of mine"),
        )
