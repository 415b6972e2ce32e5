"""The settings that both programs have, each once, and their checks. Every mistake is a ValueError of one sentence."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from depo_gateway.estimator.configuration import addresses
from depo_gateway.estimator.configuration.yaml_tree import at_least, within


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a program answers HTTP."""

    host: str = "127.0.0.1"
    port: int = field(kw_only=True)  # each program has its own default


@dataclass(frozen=True, slots=True)
class BackendConfig:
    url: str  # with or without /v1
    api_key_env: str | None = None  # the environment variable that holds the backend's own key


@dataclass(frozen=True, slots=True)
class PoolBackends:
    """One model, the servers that run it, and its price."""

    model: str  # the backends' name for it
    backends: tuple[BackendConfig, ...]
    cost: float = 1.0  # any unit, per 1,000 tokens


@dataclass(frozen=True, slots=True)
class RecordsDatabase:
    """The database that gateways write and the learner reads."""

    url: str | None = None  # in SQLAlchemy's form
    url_env: str | None = None  # instead: the environment variable that holds it


Database = TypeVar("Database", bound=RecordsDatabase)


def check_backends(name: str, pool: PoolBackends) -> None:
    """The model's name, the backends' addresses and keys, and the cost of the pool `name`."""
    if not pool.model:
        raise ValueError(f"pools.{name}.model is empty; write what the backend calls the model")
    if not pool.backends:
        raise ValueError(f"pools.{name}.backends is empty; list at least one url")
    for index, backend in enumerate(pool.backends):
        where = f"pools.{name}.backends[{index}]"
        addresses.check_http(backend.url, f"{where}.url")
        addresses.check_secret(backend.api_key_env, f"{where}.api_key_env")
    at_least(pool.cost, 0, f"pools.{name}.cost")


def check_port(port: int, where: str) -> None:
    within(port, 0, 65535, where)


def resolve_database(records: Database, directory: Path, where: str) -> Database:
    """The section with an SQLite file's path made absolute from `directory`; one of url and url_env must be set.

    A server's address in an environment variable stays there, since it may hold a password. `where` names the address
    in messages.
    """
    if records.url is not None and records.url_env is not None:
        raise ValueError("records has both url and url_env; write one of them")
    addresses.check_secret(records.url_env, "records.url_env")
    placed = addresses.placed_database(database_url(records), where, directory)
    if records.url_env is not None and not placed.startswith(addresses.SQLITE):
        return records
    return dataclasses.replace(records, url=placed, url_env=None)


def database_url(records: RecordsDatabase) -> str:
    """The database's address, from the section or from the environment."""
    return records.url if records.url is not None else os.environ[records.url_env or ""]
