"""Every setting of the learner: one frozen tree read from learner.yaml, in which unknown keys are errors.

Only the records' address is required, and the command line may give it instead. Without pools the learner learns from
feedback alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depo_gateway.estimator.configuration import yaml_tree
from depo_gateway.estimator.configuration.shared import (
    Listen,
    PoolBackends,
    RecordsDatabase,
    check_backends,
    check_port,
    resolve_database,
)
from depo_gateway.estimator.configuration.yaml_tree import at_least, within
from depo_gateway.training.judging.judges import JudgeConfig
from depo_gateway.training.judging.label_sources import check_judge
from depo_gateway.training.online.refresh_config import OwnerGate, RefreshConfig


@dataclass(frozen=True, slots=True)
class ShadowConfig:
    """How the pools that did not serve a record are asked for their answers."""

    share: float = 0.0  # of the records; 0: no shadowing
    max_concurrent: int = 4  # records at once
    priority: int | None = 10  # vLLM's: lower is served first; client requests have 0
    max_tokens: int = 1024  # of an answer; an answer that it cuts is not judged
    cost_per_hour: float | None = None  # in the unit of pools.*.cost; None: no cap
    cost_per_day: float | None = None  # a day ends at midnight UTC
    tokens_per_day: int | None = None  # of all calls, the judge's among them
    records_per_day: int | None = None  # shadowed and judged
    busy_waiting: float | None = 0.0  # pause while a backend has more requests waiting; None: never
    timeout_s: float = 120.0  # one call
    max_age_hours: float = 24.0  # older records are skipped
    confidence_of_served: bool = False  # also ask the pool that served again, for its token confidence


@dataclass(frozen=True, slots=True)
class RefreshSettings:
    """When the estimator is trained, and how many checkpoints are retained."""

    every_labels: int = 100  # newly labelled records
    every_minutes: float = 60.0  # at most so long, if there is any new label
    keep: int = 5  # checkpoints; the one that `current` names is never deleted
    learn: RefreshConfig = field(default_factory=RefreshConfig)


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    records: RecordsDatabase = field(default_factory=RecordsDatabase)
    pools: Mapping[str, PoolBackends] = field(default_factory=dict)  # named as the gateway's
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    refresh: RefreshSettings = field(default_factory=RefreshSettings)
    gate: OwnerGate = field(default_factory=OwnerGate)
    listen: Listen = field(default_factory=lambda: Listen(port=9100))  # /metrics and /livez
    reference: str | None = None  # an outcome table on which no refresh may route worse


def load_settings(
    path: Path | None, records: str | None = None, max_cost_increase: float | None = None
) -> LearnerSettings:
    """A checked learner.yaml (None: all defaults). The others, from the command line, override the file's.

    Relative paths in the file are relative to its own directory.

    Raises:
        ValueError: one sentence that names the key at fault and the remedy.
    """
    raw = {} if path is None else yaml_tree.read_yaml(path)
    if raw is None:  # an empty file
        raw = {}
    try:
        tree = parse_settings(raw, Path() if path is None else path.parent, records)
    except ValueError as error:
        raise ValueError(str(error) if path is None else f"{path}: {error}") from None
    if max_cost_increase is None:
        return tree
    within(max_cost_increase, 0, 1, "--max-cost-increase")
    return dataclasses.replace(tree, gate=OwnerGate(max_cost_increase))


def parse_settings(raw: Mapping[str, Any], directory: Path = Path(), records: str | None = None) -> LearnerSettings:
    """A checked tree from plain YAML values; see `load_settings`."""
    tree: LearnerSettings = yaml_tree.build(LearnerSettings, raw, "")
    if records is not None:
        tree = dataclasses.replace(tree, records=RecordsDatabase(url=records))
    beside = directory if records is None else Path()  # a command's path is relative to where it was called
    tree = dataclasses.replace(tree, records=_with_database(tree.records, beside))
    if tree.reference is not None:
        tree = dataclasses.replace(tree, reference=str(directory / Path(tree.reference).expanduser()))
    _check(tree)
    return tree


def _check(tree: LearnerSettings) -> None:
    for name, pool in tree.pools.items():
        check_backends(name, pool)
    _check_shadow(tree)
    check_judge(tree.judge, tree.pools)
    refresh = tree.refresh
    at_least(refresh.every_labels, 1, "refresh.every_labels")
    at_least(refresh.every_minutes, 0.001, "refresh.every_minutes")
    at_least(refresh.keep, 1, "refresh.keep")
    check_port(tree.listen.port, "listen.port")


def _check_shadow(tree: LearnerSettings) -> None:
    shadow = tree.shadow
    within(shadow.share, 0, 1, "shadow.share")
    at_least(shadow.max_concurrent, 1, "shadow.max_concurrent")
    at_least(shadow.max_tokens, 1, "shadow.max_tokens")
    at_least(shadow.timeout_s, 0.001, "shadow.timeout_s")
    at_least(shadow.max_age_hours, 0.001, "shadow.max_age_hours")
    for limit, where in (
        *((getattr(shadow, name), f"shadow.{name}") for name in ("cost_per_hour", "cost_per_day")),
        *((getattr(shadow, name), f"shadow.{name}") for name in ("tokens_per_day", "records_per_day")),
        (shadow.busy_waiting, "shadow.busy_waiting"),
    ):
        if limit is not None:
            at_least(limit, 0, where)
    if shadow.share > 0 and not tree.pools:
        raise ValueError("shadow.share is above 0, but there are no pools to ask; write pools, named as the gateway's")


def _with_database(records: RecordsDatabase, directory: Path) -> RecordsDatabase:
    if records.url is None and records.url_env is None:
        raise ValueError(
            "the records' address is missing; give --records URL, or records.url or records.url_env in the config"
        )
    return resolve_database(records, directory, "the records' address")
