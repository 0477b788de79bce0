"""A PostgreSQL of one's own: on loopback, a random port, in one folder, nothing left behind."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import OperationalError

from fabric.errors import SettingInvalid
from fabric.testing.guarded import Guarded
from fabric.testing.ports import free_port

START_TIMEOUT_S = 90.0
OWNER = "fabric"
USERS = ("postgres", "nobody")
"""Who the server runs as where this process is root, which the server refuses to be."""

INSTALLED = "/usr/lib/postgresql"
"""Where Debian keeps its programs, by version."""

# What is lost with the machine was a test's.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "64MB",
    "max_connections": "100",
}


@dataclass(slots=True, kw_only=True)
class Postgres:
    """One server.

    Attributes:
        directory: Everything it writes; where this process is root it must be reachable by others.
    """

    directory: Path
    port: int = field(default_factory=free_port)
    _password: str = field(default_factory=lambda: secrets.token_hex(16), init=False, repr=False)
    _server: Guarded | None = field(default=None, init=False)

    def url(self, database: str = "postgres") -> str:
        """Return the address of one of its databases."""
        url = URL.create(
            "postgresql",
            username=OWNER,
            password=self._password,
            host="127.0.0.1",
            port=self.port,
            database=database,
        )
        return url.render_as_string(hide_password=False)

    def start(self) -> None:
        """Make the cluster's files and start the server.

        Raises:
            SettingInvalid: PostgreSQL is not installed.
            TimeoutError: It does not come up.
        """
        data, password = self.directory / "data", self.directory / "password"
        password.write_text(self._password)
        password.chmod(0o600)
        as_user = _as_user(self.directory, password)
        environ = os.environ | {"LC_ALL": "C"}
        subprocess.run(
            [
                *(*as_user, _find("initdb"), f"--pgdata={data}", f"--username={OWNER}"),
                *("--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8"),
                *("--locale=C", "--no-sync", "--no-instructions"),
            ],
            cwd=self.directory,
            env=environ,
            check=True,
            capture_output=True,
        )
        settings = [f"--{name}={value}" for name, value in {**SETTINGS, "port": self.port}.items()]
        self._server = Guarded(
            [*as_user, _find("postgres"), "-D", str(data), *settings],
            self.directory / "postgres.log",
            environ,
            self.directory,
        )
        self._wait()

    def create(self, name: str, *, template: str = "template1") -> str:
        """Make a database, as a copy of another that nobody uses, and return its address."""
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        return self.url(name)

    def drop(self, name: str) -> None:
        """Delete a database, whoever is connected to it."""
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def close(self) -> None:
        """End the server and whoever is connected to it. Calling it twice is harmless."""
        if self._server is None:
            return
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int((self.directory / "data/postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGINT)
        self._server.stop()
        self._server = None

    def _execute(self, statement: str) -> None:
        engine = create_engine(_driven(self.url()), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()

    def _wait(self) -> None:
        assert self._server is not None
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self._execute("SELECT 1")
            except OperationalError as error:
                if time.monotonic() > until or not self._server.running:
                    raise TimeoutError(
                        f"PostgreSQL did not come up: {self._server.log_tail}"
                    ) from error
                time.sleep(0.05)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Yield a server, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        server = Postgres(directory=Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.close()


def _driven(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def _as_user(*paths: Path) -> list[str]:
    """Return how a command is begun that root may not run, after giving these paths away."""
    if os.geteuid() != 0:
        return []
    known = {user.pw_name: user for user in pwd.getpwall()}
    user = next(known[name] for name in USERS if name in known)
    for path in paths:
        os.chown(path, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _find(program: str) -> str:
    """Return a program of the newest server."""
    versions = sorted(
        Path(INSTALLED).glob(f"*/bin/{program}"),
        key=lambda path: float(path.parents[1].name),
    )
    found = str(versions[-1]) if versions else shutil.which(program)
    if found is None:
        raise SettingInvalid(
            setting=program,
            value=program,
            reason="it is not installed; run `apt-get install postgresql`",
        )
    return found
