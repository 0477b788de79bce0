"""The hub's database, opened by the commands that work on it."""

from __future__ import annotations

import functools
import os
import pwd
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fabric.cli.exits import Exit
from fabric.cli.options import output_options
from fabric.cli.output import note
from fabric.errors import RequestInvalid

if TYPE_CHECKING:
    from fabric.audit import AuditLog
    from fabric.auth import Grants, Groups, Keys, Tiers, Users
    from fabric.catalog import Catalog
    from fabric.ledger import Ledger
    from fabric.sql import Database

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The rooms that keep records, over one open database."""

    database: Database
    keys: Keys
    groups: Groups
    users: Users
    grants: Grants
    audit: AuditLog
    catalog: Catalog
    ledger: Ledger
    tiers: Tiers


@contextmanager
def open_books(
    database_url: str | None,
    *,
    around: Callable[[Database], AbstractContextManager[None]] | None = None,
) -> Iterator[Books]:
    """Open the hub's database, brought to this release's schema.

    What the running command changes is in the audit log.

    Args:
        database_url: Where it is; ``None`` for what the settings say.
        around: Holds all that is done, the migration included.

    Raises:
        SettingInvalid: It cannot be opened, or is a newer release's.
    """
    from fabric.audit import recording
    from fabric.config import StateDir, load_settings
    from fabric.sql import Database, migrate

    settings = load_settings({"hub.database_url": database_url})
    if settings.hub.database_url is None:
        StateDir(settings.state_dir).create()
    with (
        Database(settings.get_database_url()) as database,
        around(database) if around else nullcontext(),
    ):
        migrate(database)
        _, _, command = click.get_current_context().command_path.partition(" ")
        with recording(database, who=_who(), what=command):
            yield get_books(database)


def get_books(database: Database) -> Books:
    """Return the rooms over an open database of this release's schema."""
    from fabric.audit import AuditLog
    from fabric.auth import Grants, Groups, Keys, Tiers, Users
    from fabric.catalog import Catalog
    from fabric.ledger import Ledger

    return Books(
        database=database,
        keys=Keys(database),
        groups=Groups(database),
        users=Users(database),
        grants=Grants(database),
        audit=AuditLog(database),
        catalog=Catalog(database),
        ledger=Ledger(database),
        tiers=Tiers(database),
    )


def database_options(function: Command) -> Command:
    """Add ``--database`` to ``output_options``; the function gets ``books`` and ``output``.

    What it changes is in the audit log.
    """

    @output_options
    @click.option("--database", "database_url", metavar="URL", help="The hub's database.")
    @functools.wraps(function)
    def wrapper(*args: Any, database_url: str | None, **kwargs: Any) -> Any:
        with open_books(database_url) as books:
            return function(*args, books=books, **kwargs)

    return wrapper  # type: ignore[return-value]


def _who() -> str:
    """Return who runs the command, as the operating system knows them: no variable says it."""
    user = pwd.getpwuid(os.getuid()).pw_name
    with suppress(OSError):
        if (login := os.getlogin()) != user:
            user = f"{login} as {user}"
    return f"cli:{user}@{socket.gethostname()}"


DRY_RUN = "fabric.cli.dry_run"
"""Set in the context's ``meta`` while what a command does will be undone."""

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost; end the command unless the answer is yes.

    Where nobody can answer, ``--yes`` is needed. A dry run loses nothing and asks nothing.
    """
    yes = yes or DRY_RUN in click.get_current_context().meta
    if not yes and not (sys.stdin.isatty() and click.confirm(question, err=True)):
        click.echo("Nothing was changed; -y does it without asking.", err=True)
        click.get_current_context().exit(Exit.REFUSED)


class UtcTime(click.DateTime):
    """A date or a time in UTC on the command line."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the time."""
        parsed: datetime = super().convert(value, param, ctx)
        return parsed.replace(tzinfo=UTC)


UTC_TIME = UtcTime()


def check_future(option: str, at: datetime | None) -> None:
    """Refuse an end that lies in the past.

    Raises:
        RequestInvalid: It does.
    """
    if at is not None and at <= datetime.now(UTC):
        reason = "it is over; give a time to come, or use `delete` to end it now"
        raise RequestInvalid(param=option, value=at.isoformat(), reason=reason)


def warn_of_absent(books: Books, *, model: str | None = None, site: str | None = None) -> None:
    """Say which of these is not in the catalog: it may be added later, or be mistyped."""
    models = {name for one in books.catalog.models() for name in (one.name, one.ref)}
    sites = {one.name for one in books.catalog.sites()}
    for kind, name, known in (("model", model, models), ("site", site, sites)):
        if name not in (None, "*") and name not in known:
            note(f"There is no {kind} {name!r} yet: this counts once it is added.")


def day(at: datetime | None, otherwise: str = "") -> str:
    """Return a time as people read it."""
    return otherwise if at is None else f"{at:%Y-%m-%d %H:%M}"
