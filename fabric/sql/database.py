"""One database: SQLite in WAL mode by default, PostgreSQL for several hubs."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from fabric.errors import FabricError, SettingInvalid, StorageBusy, StorageFull

BUSY_TIMEOUT_S = 10.0
"""How long a transaction waits for another process's before it gives up."""

MAX_LOG_PAGES = 16384
"""Pages of 4 KiB of SQLite's log at which a commit itself copies them into the file, and waits for
the disk. A process that commits all day calls ``checkpoint`` so that little is left to copy."""

_SETTING = "hub.database_url"
_FULL = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "53100"})
_BUSY = frozenset({"SQLITE_BUSY", "SQLITE_BUSY_SNAPSHOT", "55P03", "40001", "40P01"})


class _Thread(threading.local):
    """What a database knows of one thread: the transaction and the read that it is in, whether its
    transactions share a connection, and that connection."""

    def __init__(self) -> None:
        self.writing: Connection | None = None
        self.reading: Connection | None = None
        self.sharing = False
        self.kept: Connection | None = None


class Database:
    """An engine and its transactions. The constructor does no I/O; ``open`` and ``close`` do.

    Thread-safe. What is done inside a transaction of the same thread is part of it, so a caller may
    group the calls of several rooms into one commit; reads inside a read share its snapshot.

    Args:
        url: An SQLAlchemy URL of a SQLite file or a PostgreSQL database; psycopg is the driver of
            the latter unless it names another.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: Engine | None = None
        self._reads: Engine | None = None
        self._thread = _Thread()

    def open(self) -> Self:
        """Create the engine and the SQLite file, readable by its owner alone.

        Raises:
            SettingInvalid: The URL cannot be used, or no database answers there.
            StorageBusy: Another process holds the database.
        """
        url = self._parse()
        is_sqlite = url.get_backend_name() == "sqlite"
        try:
            if is_sqlite and url.database is not None:
                os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))
                engine = create_engine(url.set(drivername="sqlite+immediate"))
                reads = create_engine(url.set(drivername="sqlite+deferred"))
            else:
                engine = create_engine(url, pool_pre_ping=True)
                reads = engine.execution_options(isolation_level="REPEATABLE READ")
        except ImportError as error:
            reason = f"{error}; PostgreSQL needs `pip install fabric-inference[postgres]`"
            raise self.unusable(reason) from error
        except (OSError, ArgumentError, NoSuchModuleError) as error:
            raise self.unusable(str(error)) from error
        if is_sqlite:
            for each in (engine, reads):
                event.listen(each, "connect", _configure_sqlite)
                event.listen(each, "handle_error", _abandon_undone)
        try:
            with reads.connect() as connection:
                if is_sqlite:
                    connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
        except DBAPIError as error:
            engine.dispose()
            reads.dispose()
            raise _typed(error) or self.unusable(str(error.orig)) from error
        self._engine, self._reads = engine, reads
        return self

    def close(self) -> None:
        """Close the connections. Calling it twice is harmless."""
        for engine in (self._engine, self._reads):
            if engine is not None:
                engine.dispose()
        self._engine = self._reads = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine of an open database."""
        if self._engine is None:
            raise RuntimeError("The database is not open; call open() or use it in a with block.")
        return self._engine

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Commit all that is executed in the block, or nothing of it.

        On SQLite it starts with BEGIN IMMEDIATE, so what it reads stays true until it writes.
        Inside another transaction of this thread it is a savepoint of that one.

        Raises:
            StorageFull: The disk is full; nothing was written.
            StorageBusy: Another process kept the database locked.
        """
        outer = self._thread.writing
        with _typed_errors():
            if outer is not None:
                with outer.begin_nested():
                    yield outer
                return
            with self._connect() as connection, connection.begin():
                self._thread.writing = connection
                try:
                    yield connection
                finally:
                    self._thread.writing = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file of SQLite's, and not a server."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Let this thread's transactions on a file share one connection meanwhile: a part of what a
        small one costs is to fetch it and to give it back.

        Of a server, whose connections break, each takes one that was tried.
        """
        self._thread.sharing = True
        try:
            yield
        finally:
            self._thread.sharing = False
            self._let_go()

    @contextmanager
    def joined(self) -> Iterator[Connection]:
        """Write as a part of this thread's transaction, or in one of its own.

        Cheaper than a savepoint, for writes whose errors either come before the first of them or
        leave the outer block. Raises as ``transaction`` does.
        """
        outer = self._thread.writing
        if outer is not None:
            yield outer
            return
        with self.transaction() as connection:
            yield connection

    def checkpoint(self) -> int:
        """Copy SQLite's log into its file beside the writers, none of which waits for it, and
        return how many pages the log has.

        Does nothing on PostgreSQL, whose server does it.
        """
        if not self.is_file:
            return 0
        with closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("PRAGMA wal_checkpoint(PASSIVE)")
            (_, num_pages, _), *_ = cursor.fetchall()
            return int(num_pages)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Read one consistent snapshot; writers are not kept waiting.

        Inside a transaction or another read of this thread it sees what that one sees.

        Raises:
            StorageBusy: Another process kept the database locked.
        """
        outer = self._thread.writing or self._thread.reading
        if outer is not None:
            yield outer
            return
        with _typed_errors(), (self._reads or self.engine).begin() as connection:
            self._thread.reading = connection
            try:
                yield connection
            finally:
                self._thread.reading = None

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        engine = self.engine
        if not (self._thread.sharing and self.is_file):
            with engine.connect() as connection:
                yield connection
            return
        kept = self._thread.kept
        if kept is None or kept.engine is not engine:
            self._let_go()
            kept = self._thread.kept = engine.connect()
        try:
            yield kept
        finally:
            if kept.invalidated:
                self._let_go()

    def _let_go(self) -> None:
        kept, self._thread.kept = self._thread.kept, None
        if kept is not None:
            kept.close()

    def _parse(self) -> URL:
        try:
            url = make_url(self.url)
        except ArgumentError as error:
            raise self.unusable("it is not a database URL") from error
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise self.unusable("only sqlite and postgresql are supported")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() == "sqlite":
            if url.database in (None, "", ":memory:"):
                raise self.unusable("a database in memory would be another one in every thread")
            if not Path(str(url.database)).parent.is_dir():
                raise self.unusable("its directory does not exist")
        return url

    @property
    def shown_url(self) -> str:
        """The URL as it was given, without its password."""
        with suppress(ArgumentError):
            return make_url(self.url).render_as_string(hide_password=True)
        return self.url

    def unusable(self, reason: str) -> SettingInvalid:
        """Return the error that this database cannot be used."""
        return SettingInvalid(setting=_SETTING, value=self.shown_url, reason=reason)


class _Immediate(SQLiteDialect_pysqlite):
    """SQLite whose transactions begin by taking the lock: what is read stays true until they write.

    The driver, told so by ``isolation_level``, begins none of its own.
    """

    driver = "immediate"
    supports_statement_cache = True
    begin = "BEGIN IMMEDIATE"

    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        """Begin; SQLAlchemy's own trusts in the driver."""
        dbapi_connection.cursor().execute(self.begin)


class _Deferred(_Immediate):
    """SQLite whose transactions only read."""

    driver = "deferred"
    supports_statement_cache = True
    begin = "BEGIN"


for _dialect in (_Immediate, _Deferred):
    registry.register(f"sqlite.{_dialect.driver}", __name__, _dialect.__name__)


def _configure_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Take BEGIN out of the driver's hands and set what each connection must set."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {MAX_LOG_PAGES}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _abandon_undone(context: ExceptionContext) -> None:
    """Let nothing more run in a transaction that SQLite undid by itself, as on a full disk.

    What came after would be committed statement by statement; an invalidated connection refuses it
    until the block has ended.
    """
    if context.connection is not None and not context.is_disconnect:
        context.is_disconnect = is_undone(context.connection.connection.dbapi_connection)
        context.invalidate_pool_on_disconnect = False


def is_undone(driver: object) -> bool:
    """Return whether a driver's connection is to SQLite and in no transaction any more."""
    return isinstance(driver, sqlite3.Connection) and not driver.in_transaction


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if (typed := _typed(error)) is None:
            raise
        raise typed from error


def _typed(error: DBAPIError) -> FabricError | None:
    """Return the error as ours where its code (SQLite's name, PostgreSQL's SQLSTATE) says so."""
    code = getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None)
    if code in _FULL:
        return StorageFull(reason=str(error.orig))
    if code in _BUSY:
        return StorageBusy(reason=str(error.orig))
    return None
