"""Every setting of the learner, as one frozen tree read from learner.yaml. The tree is closed, as the gateway's is.

No setting is required but the records' address, which the command line may give instead: without pools the learner
learns from feedback alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from depo_gateway.estimator.configuration import addresses, yaml_tree
from depo_gateway.estimator.configuration.yaml_tree import at_least, within
from depo_gateway.training.online.refresh_config import RefreshConfig

JudgeKind = Literal["none", "exact", "math", "model", "webhook"]


@dataclass(frozen=True, slots=True)
class Records:
    """The database that the gateways write."""

    url: str | None = None  # as SQLAlchemy writes it
    url_env: str | None = None  # instead: the environment variable that holds it


@dataclass(frozen=True, slots=True)
class BackendConfig:
    url: str  # with or without /v1
    api_key_env: str | None = None  # the environment variable that holds the backend's own key


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A pool as the learner asks it; the names are the gateway's."""

    model: str  # what the backends call it
    backends: tuple[BackendConfig, ...]
    cost: float = 1.0  # any unit, per 1,000 tokens


@dataclass(frozen=True, slots=True)
class ShadowConfig:
    """What is asked of the pools that did not serve a record."""

    share: float = 0.0  # of the records; 0: nothing is asked
    max_concurrent: int = 4  # records at once
    priority: int | None = 10  # vLLM's: lower is served first, clients' requests have 0
    max_tokens: int = 1024  # of an answer; an answer cut by it is not judged
    cost_per_hour: float | None = None  # in the unit of pools.*.cost; None: no cap
    busy_waiting: float | None = 0.0  # pause while a backend has more requests waiting; None: never
    timeout_s: float = 120.0  # one call
    max_age_hours: float = 24.0  # older records are passed over
    confidence_of_served: bool = False  # ask the pool that served again too, for its token confidence


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """Who scores the answers."""

    kind: JudgeKind = "none"  # none: token confidence alone
    pool: str | None = None  # model: the pool that judges
    url: str | None = None  # webhook
    api_key_env: str | None = None  # webhook: the environment variable with its bearer token
    timeout_s: float = 30.0  # one verdict


@dataclass(frozen=True, slots=True)
class RefreshSettings:
    """When the estimator is trained, and what is kept."""

    every_labels: int = 100  # newly labelled records
    every_minutes: float = 60.0  # if there is any new label
    keep: int = 5  # checkpoints; the one that `current` names always stays
    learn: RefreshConfig = field(default_factory=RefreshConfig)


@dataclass(frozen=True, slots=True)
class Listen:
    """Where /metrics and /livez answer."""

    host: str = "127.0.0.1"
    port: int = 9100


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    records: Records = field(default_factory=Records)
    pools: Mapping[str, PoolConfig] = field(default_factory=dict)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    refresh: RefreshSettings = field(default_factory=RefreshSettings)
    listen: Listen = field(default_factory=Listen)
    reference: str | None = None  # an outcome table that no refresh may do worse on


def load_settings(path: Path | None, records: str | None = None) -> LearnerSettings:
    """A checked learner.yaml (None: all defaults). `records`, of the command line, stands over the file's.

    Relative paths in the file are relative to its own directory.

    Raises:
        ValueError: one sentence that names the key at fault and the remedy.
    """
    raw = {} if path is None else yaml_tree.read_yaml(path)
    if raw is None:  # an empty file
        raw = {}
    try:
        return parse_settings(raw, Path() if path is None else path.parent, records)
    except ValueError as error:
        raise ValueError(str(error) if path is None else f"{path}: {error}") from None


def parse_settings(raw: Mapping[str, Any], directory: Path = Path(), records: str | None = None) -> LearnerSettings:
    """A checked tree from plain YAML values; see `load`."""
    tree: LearnerSettings = yaml_tree.build(LearnerSettings, raw, "")
    if records is not None:
        tree = dataclasses.replace(tree, records=Records(url=records))
    beside = directory if records is None else Path()  # a command's path is relative to where it was called
    tree = dataclasses.replace(tree, records=_with_url(tree.records, beside))
    if tree.reference is not None:
        tree = dataclasses.replace(tree, reference=str(directory / Path(tree.reference).expanduser()))
    _check(tree)
    return tree


def database_url(records: Records) -> str:
    """The database's address, wherever it is written."""
    return records.url if records.url is not None else os.environ[records.url_env or ""]


def _check(tree: LearnerSettings) -> None:
    for name, pool in tree.pools.items():
        if not pool.model:
            raise ValueError(f"pools.{name}.model is empty; write what the backend calls the model")
        if not pool.backends:
            raise ValueError(f"pools.{name}.backends is empty; list at least one url")
        for index, backend in enumerate(pool.backends):
            addresses.check_http(backend.url, f"pools.{name}.backends[{index}].url")
            addresses.check_secret(backend.api_key_env, f"pools.{name}.backends[{index}].api_key_env")
        at_least(pool.cost, 0, f"pools.{name}.cost")
    shadow = tree.shadow
    within(shadow.share, 0, 1, "shadow.share")
    at_least(shadow.max_concurrent, 1, "shadow.max_concurrent")
    at_least(shadow.max_tokens, 1, "shadow.max_tokens")
    at_least(shadow.timeout_s, 0.001, "shadow.timeout_s")
    at_least(shadow.max_age_hours, 0.001, "shadow.max_age_hours")
    for limit, where in (
        (shadow.cost_per_hour, "shadow.cost_per_hour"),
        (shadow.busy_waiting, "shadow.busy_waiting"),
    ):
        if limit is not None:
            at_least(limit, 0, where)
    if shadow.share > 0 and not tree.pools:
        raise ValueError("shadow.share is above 0, but there are no pools to ask; write pools, named as the gateway's")
    _check_judge(tree)
    refresh = tree.refresh
    at_least(refresh.every_labels, 1, "refresh.every_labels")
    at_least(refresh.every_minutes, 0.001, "refresh.every_minutes")
    at_least(refresh.keep, 1, "refresh.keep")
    within(tree.listen.port, 0, 65535, "listen.port")


def _with_url(records: Records, directory: Path) -> Records:
    if (records.url is None) == (records.url_env is None):
        both = records.url is not None
        raise ValueError(
            "records has both url and url_env; write one of them"
            if both
            else "the records' address is missing; give --records URL, or records.url or records.url_env in the config"
        )
    addresses.check_secret(records.url_env, "records.url_env")
    placed = addresses.placed_database(database_url(records), "the records' address", directory)
    if records.url_env is not None and not placed.startswith(addresses.SQLITE):
        return records  # a password stays where it is
    return Records(url=placed)


def _check_judge(tree: LearnerSettings) -> None:
    judge = tree.judge
    at_least(judge.timeout_s, 0.001, "judge.timeout_s")
    if judge.kind == "model" and judge.pool not in tree.pools:
        known = ", ".join(tree.pools) or "none are configured"
        given = "" if judge.pool is None else f", not {judge.pool!r}"
        raise ValueError(f"judge.kind: model wants judge.pool, the pool that judges{given}; the pools are: {known}")
    if judge.kind == "webhook":
        if judge.url is None:
            raise ValueError("judge.kind: webhook wants judge.url, the address that answers are posted to")
        addresses.check_http(judge.url, "judge.url", query=True)
        addresses.check_secret(judge.api_key_env, "judge.api_key_env")
    for name, kind in (("pool", "model"), ("url", "webhook"), ("api_key_env", "webhook")):
        if getattr(judge, name) is not None and judge.kind != kind:
            raise ValueError(f"judge.{name} is read by kind: {kind} alone, and judge.kind is {judge.kind}")
