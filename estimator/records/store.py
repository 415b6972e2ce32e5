"""The records store: served requests and their labels, in SQLite or PostgreSQL. One code path for both.

Gateways append records and feedback; the learner reads them and adds labels. All open the same database from their own
processes. Writes are durable when a method returns: SQLite runs in WAL mode with synchronous=FULL
(https://www.sqlite.org/pragma.html#pragma_synchronous); PostgreSQL commits as its server is configured.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from depo_gateway.estimator.records.tables import (
    ADDED_LATER,
    DATABASE_SCHEMA,
    LABELS,
    METADATA,
    RECORDS,
    ROUTING_SETTINGS,
    SHADOWED,
    VERSIONS,
    label_row,
    record_of,
    row_of,
    settings_of,
    settings_row,
    storable_text,
)
from depo_gateway.estimator.records.types import (
    FEEDBACK,
    REPEATABLE_ENDPOINTS,
    Label,
    Labelled,
    Record,
    RoutingSettings,
)

WAIT_SECONDS = 5  # for another writer's lock, or a connection
READ_SECONDS = 300  # the learner's longest query
CHUNK = 500  # records that one transaction deletes, so that no writer waits long
CREATE_LOCK = 0x6465706F  # PostgreSQL's advisory lock while tables are created


class StoreError(OSError):
    """The database is unreachable or refuses; one sentence that names it, without its password."""

    def __init__(self, message: str, rejected: bool = False) -> None:
        super().__init__(message)
        self.rejected = rejected  # because of the values: a retry fails too


@dataclass(frozen=True, slots=True)
class Feedback:
    """An application's score of the answer that its key got under this request id."""

    id: str
    key: str
    score: float  # in [0, 1]
    comment: str = ""
    time: float = 0.0  # Unix seconds


class Store:
    """One database. Methods may be called from any thread; each is one transaction unless it says otherwise.

    Raises:
        ValueError: one sentence: the address is invalid, or its driver is not installed.
        StoreError: from every method, if the database is unreachable, full, locked or read-only.
    """

    def __init__(self, url: str) -> None:
        address = _address(url)
        self.name = address.set(query={}).render_as_string(hide_password=True)
        self._sqlite = address.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"timeout": WAIT_SECONDS}
        if not self._sqlite:
            milliseconds = f"-c statement_timeout={READ_SECONDS * 1000} -c lock_timeout={WAIT_SECONDS * 1000}"
            options = {"connect_timeout": WAIT_SECONDS, "tcp_user_timeout": 2 * WAIT_SECONDS * 1000}
            options = {"options": milliseconds, **options}
            options = {name: value for name, value in options.items() if name not in address.query}
        try:
            self._engine = sa.create_engine(
                address, connect_args=options, pool_pre_ping=not self._sqlite, pool_timeout=WAIT_SECONDS
            )
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the records database {self.name} needs {error.name}: pip install 'depo-gateway[postgres]'"
            ) from None
        self._lacking: set[str] = set(ADDED_LATER)  # columns that the database may lack, until it is known to have all
        self._stored_settings: dict[str, RoutingSettings] = {}  # by digest, as the database holds them
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    def create(self) -> None:
        """Creates missing tables, and the columns that earlier versions lack; several processes may do so at once.

        Raises:
            ValueError: another version of this software created the database.
        """
        with self._transaction(write=True) as connection:
            if not self._sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATE_LOCK)))
            known = sa.inspect(connection).has_table(VERSIONS.name)
            found = connection.execute(sa.select(VERSIONS.c.version)).scalar() if known else None
            if found not in (None, DATABASE_SCHEMA):
                raise ValueError(
                    f"the records database {self.name} was created by another version "
                    f"(schema {found}, here {DATABASE_SCHEMA}); "
                    "use that version, or another database"
                )
            METADATA.create_all(connection)
            for name in sorted(self._lacks(connection)):  # an earlier version created the table
                connection.execute(sa.text(f'ALTER TABLE records ADD COLUMN "{name}" TEXT'))
            if found is None:
                connection.execute(VERSIONS.insert(), {"version": DATABASE_SCHEMA})

    def close(self) -> None:
        self._engine.dispose()

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; existing ones are not changed."""
        if not records:
            return
        insert = (sqlite if self._sqlite else postgresql).insert(RECORDS).on_conflict_do_nothing()
        try:
            rows = [row_of(record) for record in records]
        except orjson.JSONEncodeError as error:  # deeper than orjson writes: 254 levels
            raise StoreError(f"a record can't be written as JSON: {error}", rejected=True) from None
        content = {row["digest"]: row for row in (settings_row(r.settings) for r in records if r.settings is not None)}
        add = (sqlite if self._sqlite else postgresql).insert(ROUTING_SETTINGS).on_conflict_do_nothing()
        with self._transaction(write=True) as connection:
            if content:
                connection.execute(add, [content[digest] for digest in sorted(content)])
            connection.execute(insert, rows)

    def feedback(self, items: Sequence[Feedback]) -> list[bool]:
        """Labels the newest answer that each item's key got under its id. False: it got none."""
        found: list[bool] = []
        rows = {}
        with self._transaction(write=True) as connection:
            for item in items:
                newest = (
                    sa.select(RECORDS.c.seq, RECORDS.c.pool)
                    .where(RECORDS.c.key == storable_text(item.key), RECORDS.c.id == storable_text(item.id))
                    .where(RECORDS.c.pool != "")
                    .order_by(RECORDS.c.time.desc())
                    .limit(1)
                )
                record = connection.execute(newest).one_or_none()
                found.append(record is not None)
                if record is not None:
                    label = Label(record.seq, record.pool, FEEDBACK, item.score, None, item.time)
                    rows[label.record, label.pool, label.source] = label_row(label, storable_text(item.comment) or None)
            _put_labels(connection, rows)
        return found

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Adds labels, or replaces those of the same record, pool and source; skips records deleted meanwhile."""
        rows = {(label.record, label.pool, label.source): label_row(label, None) for label in labels}
        if rows:
            with self._transaction(write=True) as connection:
                _put_labels(connection, rows)

    def labelled(self, limit: int, since: float = 0.0) -> list[Labelled]:
        """The newest `limit` records that have a label, of `since` (Unix seconds) or later, oldest first."""
        known = sa.exists().where(LABELS.c.record == RECORDS.c.seq)
        return [item for item in self._newest(limit, since, known) if item.labels]

    def logged(self, limit: int, since: float = 0.0) -> list[Labelled]:
        """The newest `limit` records, labelled or not, of `since` (Unix seconds) or later, oldest first."""
        return self._newest(limit, since, sa.true())

    def count_labels(self, after: int = 0) -> tuple[int, int]:
        """How many records have a label of quality whose seq is above `after`; and the highest seq of any label.

        PostgreSQL may show a transaction's labels after those of a later one, so the count is approximate.
        """
        fresh = sa.and_(LABELS.c.seq > after, LABELS.c.quality.is_not(None))
        records = sa.select(sa.func.count(LABELS.c.record.distinct())).where(fresh).scalar_subquery()
        with self._transaction() as connection:
            count, highest = connection.execute(sa.select(records, sa.func.max(LABELS.c.seq))).one()
        return count, highest or 0

    def count_records(self) -> tuple[int, int]:
        """How many records there are, and how many of them hold the prompt (records.prompts: full)."""
        query = sa.select(sa.func.count(), sa.func.count(RECORDS.c.asked)).select_from(RECORDS)
        with self._transaction() as connection:
            records, asked = connection.execute(query).one()
        return records, asked

    def last_time(self) -> float | None:
        """When the newest record's request began, in Unix seconds; None without records."""
        with self._transaction() as connection:
            found: float | None = connection.execute(sa.select(sa.func.max(RECORDS.c.time))).scalar()
        return found

    def unshadowed(self, limit: int, since: float = 0.0) -> list[Record]:
        """Answered records of repeatable endpoints, with their prompt, not yet marked as shadowed, oldest first."""
        where = (
            *(RECORDS.c.asked.is_not(None), RECORDS.c.status == 200, RECORDS.c.pool != ""),
            RECORDS.c.endpoint.in_(REPEATABLE_ENDPOINTS),
            *(RECORDS.c.time >= since, ~sa.exists().where(SHADOWED.c.record == RECORDS.c.seq)),
        )
        with self._transaction() as connection:
            return self._records(connection, where, limit)

    def mark_shadowed(self, records: Sequence[int], time: float) -> None:
        """Marks records, by seq, as shadowed or skipped. Idempotent; deleted ones are ignored."""
        insert = (sqlite if self._sqlite else postgresql).insert(SHADOWED).on_conflict_do_nothing()
        with self._transaction(write=True) as connection:
            if rows := [{"record": seq, "time": time} for seq in _existing(connection, records)]:
                connection.execute(insert, rows)

    def delete_before(self, time: float, most: int | None = None) -> int:
        """Deletes older records (Unix seconds) with their labels and marks, in small transactions. Returns the number.

        At most `most` of them; None: all.
        """
        deleted = 0
        while most is None or deleted < most:
            size = CHUNK if most is None else min(CHUNK, most - deleted)
            old = sa.select(RECORDS.c.seq).where(RECORDS.c.time < time).order_by(RECORDS.c.seq).limit(size)
            with self._transaction(write=True) as connection:
                chosen = old.with_for_update(skip_locked=True)  # another gateway may be deleting too
                count = connection.execute(RECORDS.delete().where(RECORDS.c.seq.in_(chosen))).rowcount
            deleted += count
            if not count:
                break
        return deleted

    def _newest(self, limit: int, since: float, where: sa.ColumnElement[bool]) -> list[Labelled]:
        newest = (
            sa.select(RECORDS.c.seq)
            .where(RECORDS.c.time >= since, where)
            .order_by(RECORDS.c.time.desc(), RECORDS.c.seq.desc())
            .limit(limit)
        )
        named = [column for column in LABELS.c if column.name != "comment"]
        theirs = sa.select(*named).where(LABELS.c.record.in_(newest)).order_by(LABELS.c.seq)
        with self._transaction() as connection:
            records = self._records(connection, (RECORDS.c.seq.in_(newest),))
            labels: dict[int, list[Label]] = {record.seq: [] for record in records}
            for row in connection.execute(theirs).mappings():
                if row["record"] in labels:
                    labels[row["record"]].append(Label(**row))
        return [Labelled(record, tuple(labels[record.seq])) for record in records]

    def _records(
        self, connection: sa.Connection, where: Sequence[sa.ColumnElement[bool]], limit: int | None = None
    ) -> list[Record]:
        """The records that meet all conditions, oldest first."""
        lacking = self._lacks(connection)
        columns = [column for column in RECORDS.c if column.name not in lacking]
        query = sa.select(*columns).where(*where).order_by(RECORDS.c.time, RECORDS.c.seq).limit(limit)
        rows = connection.execute(query).mappings().all()
        unread = {row.get("settings") for row in rows} - {None, *self._stored_settings}
        if unread:
            stored = sa.select(ROUTING_SETTINGS).where(ROUTING_SETTINGS.c.digest.in_(unread))
            for row in connection.execute(stored).mappings():
                self._stored_settings[row["digest"]] = settings_of(row["content"])
        return [record_of(row, self._stored_settings) for row in rows]

    def _lacks(self, connection: sa.Connection) -> set[str]:
        """The columns that the table of records lacks, because an earlier version created it."""
        if self._lacking:
            self._lacking = set(ADDED_LATER) - {
                column["name"] for column in sa.inspect(connection).get_columns(RECORDS.name)
            }
        return self._lacking

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect().execution_options(depo_write=write) as connection, connection.begin():
                yield connection
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise StoreError(
                f"the records database {self.name} failed: {reason}", isinstance(error, sa.exc.DataError)
            ) from error


def _address(url: str) -> sa.URL:
    try:
        address = sa.make_url(url)
        kind = address.get_backend_name()
    except (sa.exc.ArgumentError, ValueError):  # not shown: it may hold a password
        raise ValueError(
            "records.url can't be read; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if kind == "postgresql" and "@" in (address.host or ""):  # part of the password would be shown as the host's name
        raise ValueError("records.url has an '@' in its password; write it as %40")
    if kind == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ValueError(f"records.url names {kind}; write sqlite:///FILE or postgresql://HOST/DATABASE")
    if not address.database or address.database == ":memory:" or address.host:
        raise ValueError("records.url names no file; write sqlite:///FILE, with four slashes if the path is absolute")
    folder = Path(address.database).absolute().parent
    if not os.path.isdir(folder):  # Path.is_dir raises without permission for a parent directory
        raise ValueError(f"records.url: the directory {folder} does not exist; create it or name another")
    return address


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver's own transactions lock too late
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # deleted records are overwritten in the file too


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads before it writes can't wait for another writer, so it must lock from the start.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options()["depo_write"] else "BEGIN")


def _existing(connection: sa.Connection, records: Iterable[int]) -> list[int]:
    """Those that still exist, locked until the transaction ends, in a fixed order to avoid deadlocks."""
    found: list[int] = []
    wanted = sorted(set(records))
    for start in range(0, len(wanted), CHUNK):
        query = sa.select(RECORDS.c.seq).where(RECORDS.c.seq.in_(wanted[start : start + CHUNK]))
        found += connection.execute(query.order_by(RECORDS.c.seq).with_for_update()).scalars()
    return found


def _put_labels(connection: sa.Connection, rows: Mapping[tuple[int, str, str], Mapping[str, Any]]) -> None:
    """Replaces labels instead of updating them, so that every change has a new seq."""
    existing = set(_existing(connection, (record for record, _, _ in rows)))
    found = [row for place, row in sorted(rows.items()) if place[0] in existing]
    if not found:
        return
    place = [LABELS.c[name] == sa.bindparam(f"its_{name}") for name in ("record", "pool", "source")]
    columns = ("record", "pool", "source")
    connection.execute(LABELS.delete().where(*place), [{f"its_{name}": row[name] for name in columns} for row in found])
    connection.execute(LABELS.insert(), found)
