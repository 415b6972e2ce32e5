"""The records store: what serving saw and what was found out about it, in SQLite or PostgreSQL. One code path for both.

Gateways append records and feedback, the learner reads them and adds labels; all open the same database, each from
processes of its own. What a method has returned is durable: SQLite runs in WAL mode with synchronous=FULL
(https://www.sqlite.org/pragma.html#pragma_synchronous), PostgreSQL commits as its server is set to.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from depo_gateway.estimator.records.types import FEEDBACK, Label, Labelled, Record

DATABASE_SCHEMA = 1
WAIT_SECONDS = 5  # for another writer's lock, a connection or a statement of the gateway's size
READ_SECONDS = 300  # a learner's longest query
CHUNK = 500  # records that one transaction deletes, so that no writer waits long
CREATE_LOCK = 0x6465706F  # PostgreSQL's advisory lock while tables are made
LARGEST = 2**62

_meta = sa.MetaData()
_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by itself under this type alone


def _of_record() -> sa.Column[int]:
    place = sa.ForeignKey("records.seq", ondelete="CASCADE")
    return sa.Column("record", _number, place, nullable=False)


_versions = sa.Table("depo_schema", _meta, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
_records = sa.Table(
    "records",
    _meta,
    sa.Column("seq", _number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False, index=True),
    *(
        sa.Column(name, sa.Text, nullable=False)
        for name in ("key", "endpoint", "conversation", "pool", "reason", "estimator", "stage", "pools", "quality")
    ),
    *(sa.Column(name, sa.Double) for name in ("confidence", "threshold", "first_token_seconds")),
    *(sa.Column(name, sa.Double, nullable=False) for name in ("propensity", "total_seconds")),
    sa.Column("status", sa.Integer, nullable=False),
    *(sa.Column(name, sa.BigInteger) for name in ("prompt_tokens", "completion_tokens")),
    *(sa.Column(name, sa.Text, nullable=False) for name in ("finish_reason", "prompt_hash", "parameters")),
    *(sa.Column(name, sa.Text) for name in ("asked", "answer", "reference")),
    # Clients may choose their request ids and use one again. A batch whose commit was cut off can come twice: this
    # keeps it single.
    sa.UniqueConstraint("key", "id", "time"),
    sqlite_autoincrement=True,
)
_labels = sa.Table(
    "labels",
    _meta,
    sa.Column("seq", _number, primary_key=True, autoincrement=True),
    _of_record(),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("quality", sa.Double),
    sa.Column("token_confidence", sa.Double),
    sa.Column("comment", sa.Text),
    sa.Column("time", sa.Double, nullable=False),
    sa.UniqueConstraint("record", "pool", "source"),
    sqlite_autoincrement=True,
)
_shadowed = sa.Table(
    "shadowed",
    _meta,
    _of_record(),
    sa.Column("time", sa.Double, nullable=False),
    sa.PrimaryKeyConstraint("record"),
)
_JSON = ("pools", "quality", "asked", "parameters")
_TEXT = ("finish_reason", "answer", "reference", "endpoint", "key", "id")  # what comes from outside as it is
_FIELDS = tuple(item.name for item in fields(Record))


class StoreError(OSError):
    """The database can't be reached or refuses; one sentence that names it, without its password."""

    def __init__(self, message: str, rejected: bool = False) -> None:
        super().__init__(message)
        self.rejected = rejected  # the values are at fault: the same again fails again


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
        ValueError: the address, or the driver that it needs, can't be; one sentence.
        StoreError: from every method, where the database is away, full, locked or read-only.
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
                f"the records database {self.name} wants {error.name}: pip install 'depo-gateway[postgres]'"
            ) from None
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    def create(self) -> None:
        """Makes the tables where they are absent; several processes may do so at once.

        Raises:
            ValueError: another version of this software made the database.
        """
        with self._transaction(write=True) as connection:
            if not self._sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATE_LOCK)))
            known = sa.inspect(connection).has_table(_versions.name)
            found = connection.execute(sa.select(_versions.c.version)).scalar() if known else None
            if found not in (None, DATABASE_SCHEMA):
                raise ValueError(
                    f"the records database {self.name} was made by another version "
                    f"(schema {found}, here {DATABASE_SCHEMA}); "
                    "use that version, or another database"
                )
            _meta.create_all(connection)
            if found is None:
                connection.execute(_versions.insert(), {"version": DATABASE_SCHEMA})

    def close(self) -> None:
        self._engine.dispose()

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; those that are there already are left as they are."""
        if not records:
            return
        insert = (sqlite if self._sqlite else postgresql).insert(_records).on_conflict_do_nothing()
        try:
            rows = [_row(record) for record in records]
        except orjson.JSONEncodeError as error:  # deeper than orjson writes: 254 levels
            raise StoreError(f"a record can't be written as JSON: {error}", rejected=True) from None
        with self._transaction(write=True) as connection:
            connection.execute(insert, rows)

    def feedback(self, items: Sequence[Feedback]) -> list[bool]:
        """Labels the newest answer that each item's key got under its id. False: there is none."""
        found: list[bool] = []
        rows = {}
        with self._transaction(write=True) as connection:
            for item in items:
                newest = (
                    sa.select(_records.c.seq, _records.c.pool)
                    .where(_records.c.key == _clean(item.key), _records.c.id == _clean(item.id))  # as they are stored
                    .where(_records.c.pool != "")
                    .order_by(_records.c.time.desc())
                    .limit(1)
                )
                record = connection.execute(newest).one_or_none()
                found.append(record is not None)
                if record is not None:
                    label = Label(record.seq, record.pool, FEEDBACK, item.score, None, item.time)
                    rows[label.record, label.pool, label.source] = _label_row(label, _clean(item.comment) or None)
            _put_labels(connection, rows)
        return found

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Adds labels, or overwrites those of the same record, pool and source; skips records deleted meanwhile."""
        rows = {(label.record, label.pool, label.source): _label_row(label, None) for label in labels}
        if rows:
            with self._transaction(write=True) as connection:
                _put_labels(connection, rows)

    def labelled(self, limit: int, since: float = 0.0) -> list[Labelled]:
        """The newest `limit` records that have a label, of `since` (Unix seconds) or later, oldest first."""
        known = sa.exists().where(_labels.c.record == _records.c.seq)
        return [item for item in self._newest(limit, since, known) if item.labels]

    def logged(self, limit: int, since: float = 0.0) -> list[Labelled]:
        """The newest `limit` records, labelled or not, of `since` (Unix seconds) or later, oldest first."""
        return self._newest(limit, since, sa.true())

    def count_labels(self, after: int = 0) -> tuple[int, int]:
        """How many records have a label of quality whose seq is above `after`; and the highest seq of any label.

        PostgreSQL may show a transaction's labels after those of a later one: as a count it is close, not exact.
        """
        fresh = sa.and_(_labels.c.seq > after, _labels.c.quality.is_not(None))
        records = sa.select(sa.func.count(_labels.c.record.distinct())).where(fresh).scalar_subquery()
        with self._transaction() as connection:
            count, highest = connection.execute(sa.select(records, sa.func.max(_labels.c.seq))).one()
        return count, highest or 0

    def count_records(self) -> tuple[int, int]:
        """How many records there are, and how many of them hold what was asked (records.prompts: full)."""
        query = sa.select(sa.func.count(), sa.func.count(_records.c.asked)).select_from(_records)
        with self._transaction() as connection:
            records, asked = connection.execute(query).one()
        return records, asked

    def last_time(self) -> float | None:
        """When the newest record's request began, in Unix seconds; None: there are no records."""
        with self._transaction() as connection:
            found: float | None = connection.execute(sa.select(sa.func.max(_records.c.time))).scalar()
        return found

    def unshadowed(self, limit: int, since: float = 0.0) -> list[Record]:
        """Answered records with their prompt, not yet marked as shadowed, oldest first."""
        query = (
            sa.select(_records)
            .where(_records.c.asked.is_not(None), _records.c.status == 200, _records.c.pool != "")
            .where(_records.c.time >= since, ~sa.exists().where(_shadowed.c.record == _records.c.seq))
            .order_by(_records.c.time, _records.c.seq)
            .limit(limit)
        )
        with self._transaction() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def mark_shadowed(self, records: Sequence[int], time: float) -> None:
        """Marks records, by seq, as shadowed or passed over; again is no harm, and deleted ones are skipped."""
        insert = (sqlite if self._sqlite else postgresql).insert(_shadowed).on_conflict_do_nothing()
        with self._transaction(write=True) as connection:
            if rows := [{"record": seq, "time": time} for seq in _existing(connection, records)]:
                connection.execute(insert, rows)

    def delete_before(self, time: float, most: int | None = None) -> int:
        """Deletes older records (Unix seconds), their labels and marks, in small transactions; how many records.

        At most `most` of them, None: all.
        """
        deleted = 0
        while most is None or deleted < most:
            size = CHUNK if most is None else min(CHUNK, most - deleted)
            old = sa.select(_records.c.seq).where(_records.c.time < time).order_by(_records.c.seq).limit(size)
            with self._transaction(write=True) as connection:
                chosen = old.with_for_update(skip_locked=True)  # another gateway may be at it too
                count = connection.execute(_records.delete().where(_records.c.seq.in_(chosen))).rowcount
            deleted += count
            if not count:
                break
        return deleted

    def _newest(self, limit: int, since: float, where: sa.ColumnElement[bool]) -> list[Labelled]:
        newest = (
            sa.select(_records.c.seq)
            .where(_records.c.time >= since, where)
            .order_by(_records.c.time.desc(), _records.c.seq.desc())
            .limit(limit)
        )
        chosen = sa.select(_records).where(_records.c.seq.in_(newest)).order_by(_records.c.time, _records.c.seq)
        named = [column for column in _labels.c if column.name != "comment"]
        theirs = sa.select(*named).where(_labels.c.record.in_(newest)).order_by(_labels.c.seq)
        with self._transaction() as connection:
            records = [_record(row) for row in connection.execute(chosen).mappings()]
            labels: dict[int, list[Label]] = {record.seq: [] for record in records}
            for row in connection.execute(theirs).mappings():
                if row["record"] in labels:
                    labels[row["record"]].append(Label(**row))
        return [Labelled(record, tuple(labels[record.seq])) for record in records]

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
    except (sa.exc.ArgumentError, ValueError):  # not shown: a password may stand in it
        raise ValueError(
            "records.url can't be read; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if kind == "postgresql" and "@" in (address.host or ""):  # part of it would be shown as the host's name
        raise ValueError("records.url has an '@' in its password; write it as %40")
    if kind == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ValueError(f"records.url names {kind}; write sqlite:///FILE or postgresql://HOST/DATABASE")
    if not address.database or address.database == ":memory:" or address.host:
        raise ValueError(
            "records.url names no file; write sqlite:///FILE, with four slashes where the path is absolute"
        )
    folder = Path(address.database).absolute().parent
    if not os.path.isdir(folder):  # Path.is_dir raises where a directory above may not be entered
        raise ValueError(f"records.url: the directory {folder} does not exist; make it or name another")
    return address


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver's own idea of transactions locks too late
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what retention deletes is gone from the file's pages too


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes then can't wait for another writer: it must ask for the lock at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options()["depo_write"] else "BEGIN")


def _existing(connection: sa.Connection, records: Iterable[int]) -> list[int]:
    """Those that are still there, locked until the transaction's end, always in the same order: no deadlocks."""
    found: list[int] = []
    wanted = sorted(set(records))
    for start in range(0, len(wanted), CHUNK):
        query = sa.select(_records.c.seq).where(_records.c.seq.in_(wanted[start : start + CHUNK]))
        found += connection.execute(query.order_by(_records.c.seq).with_for_update()).scalars()
    return found


def _put_labels(connection: sa.Connection, rows: Mapping[tuple[int, str, str], Mapping[str, Any]]) -> None:
    """Replaces rather than updates, so that every change has a new seq."""
    existing = set(_existing(connection, (record for record, _, _ in rows)))
    kept = [row for place, row in sorted(rows.items()) if place[0] in existing]
    if not kept:
        return
    place = [_labels.c[name] == sa.bindparam(f"its_{name}") for name in ("record", "pool", "source")]
    columns = ("record", "pool", "source")
    connection.execute(_labels.delete().where(*place), [{f"its_{name}": row[name] for name in columns} for row in kept])
    connection.execute(_labels.insert(), kept)


def _row(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _FIELDS if name != "seq"}
    for name in _JSON:
        value = row[name]
        plain = dict(value) if isinstance(value, Mapping) else value
        row[name] = None if value is None else orjson.dumps(plain).decode()
    for name in _TEXT:
        row[name] = None if row[name] is None else _clean(row[name])
    for name in ("prompt_tokens", "completion_tokens"):
        row[name] = None if row[name] is None else max(0, min(LARGEST, row[name]))
    return row


def _record(row: sa.RowMapping) -> Record:
    values: dict[str, Any] = {str(name): value for name, value in row.items()}
    for name in _JSON:
        values[name] = None if values[name] is None else orjson.loads(values[name])
    return Record(**(values | {"pools": tuple(values["pools"])}))


def _label_row(label: Label, comment: str | None) -> dict[str, Any]:
    names = ("record", "pool", "source", "quality", "token_confidence", "time")
    return {name: getattr(label, name) for name in names} | {"comment": comment}


def _clean(text: str) -> str:
    """Without what PostgreSQL's text can't hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
