"""The tables of the records database, and records and labels as their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import orjson
import sqlalchemy as sa

from depo_gateway.estimator.records.types import Label, Record, RoutingSettings, ServedPool

DATABASE_SCHEMA = 1
ADDED_LATER = ("settings", "group")  # columns of records that an earlier version's table lacks; settings: a digest
LARGEST = 2**62  # the largest token count stored

METADATA = sa.MetaData()
_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only under this type


def _of_record() -> sa.Column[int]:
    place = sa.ForeignKey("records.seq", ondelete="CASCADE")
    return sa.Column("record", _number, place, nullable=False)


VERSIONS = sa.Table("depo_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
# Few and small: gateways with equal settings share a row, named by a hash of its content
ROUTING_SETTINGS = sa.Table(
    "routing_settings",
    METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
)
RECORDS = sa.Table(
    "records",
    METADATA,
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
    # Earlier versions neither write nor read these columns, so they may use the same database
    *(sa.Column(name, sa.Text) for name in ADDED_LATER),
    # Clients may choose their request ids and use one again. A batch whose commit was cut off can come twice: this
    # keeps it single.
    sa.UniqueConstraint("key", "id", "time"),
    sqlite_autoincrement=True,
)
LABELS = sa.Table(
    "labels",
    METADATA,
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
SHADOWED = sa.Table(
    "shadowed",
    METADATA,
    _of_record(),
    sa.Column("time", sa.Double, nullable=False),
    sa.PrimaryKeyConstraint("record"),
)
_JSON = ("pools", "quality", "asked", "parameters")
_TEXT = ("finish_reason", "answer", "reference", "endpoint", "key", "id", "group")  # from outside, unchecked
_FIELDS = tuple(item.name for item in fields(Record))


def row_of(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _FIELDS if name != "seq"}
    for name in _JSON:
        value = row[name]
        plain = dict(value) if isinstance(value, Mapping) else value
        row[name] = None if value is None else orjson.dumps(plain).decode()
    for name in _TEXT:
        row[name] = None if row[name] is None else storable_text(row[name])
    for name in ("prompt_tokens", "completion_tokens"):
        row[name] = None if row[name] is None else max(0, min(LARGEST, row[name]))
    row["settings"] = None if record.settings is None else settings_row(record.settings)["digest"]
    return row


def record_of(row: sa.RowMapping, settings: Mapping[str, RoutingSettings]) -> Record:
    """`settings`: by digest."""
    values: dict[str, Any] = {str(name): value for name, value in row.items()}
    for name in _JSON:
        values[name] = None if values[name] is None else orjson.loads(values[name])
    known = settings.get(values.get("settings") or "")
    group = values.get("group") or ""  # NULL where an earlier version wrote the record
    return Record(**(values | {"pools": tuple(values["pools"]), "settings": known, "group": group}))


def settings_row(settings: RoutingSettings) -> dict[str, str]:
    content = orjson.dumps(asdict(settings))  # keys keep their order: pools are cheapest first
    return {"digest": hashlib.sha256(content).hexdigest(), "content": content.decode()}


def settings_of(content: str) -> RoutingSettings:
    raw = orjson.loads(content)
    pools = {name: ServedPool(pool["model"], pool["cost"]) for name, pool in raw["pools"].items()}
    return RoutingSettings(raw["rule"], raw["threshold"], raw["target"], pools)


def label_row(label: Label, comment: str | None) -> dict[str, Any]:
    names = ("record", "pool", "source", "quality", "token_confidence", "time")
    return {name: getattr(label, name) for name in names} | {"comment": comment}


def storable_text(text: str) -> str:
    """Without what PostgreSQL's text can't hold: NUL and lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
