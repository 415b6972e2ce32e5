"""Every setting of the gateway, as one frozen tree read from gateway.yaml.

The tree is closed: an unknown key stops start-up with a message that names it and the nearest known key. Scalars are
checked too: `threshold: "0.6"` is an error. Settings that the learner has as well are in
estimator/configuration/shared.py.
"""

import dataclasses
import hashlib
import ipaddress
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from depo_gateway.estimator.configuration import addresses, yaml_tree
from depo_gateway.estimator.configuration.shared import (
    Listen,
    PoolBackends,
    RecordsDatabase,
    check_backends,
    check_port,
    resolve_database,
)
from depo_gateway.estimator.configuration.yaml_tree import at_least, within
from depo_gateway.estimator.records.types import RoutingSettings, ServedPool
from depo_gateway.gateway.auth_config import Auth, check_digest, check_keys, with_keys_file
from depo_gateway.gateway.task_groups import check_source

Modality = Literal["text", "tools", "image", "audio"]
Rule = Literal["gain", "difficulty"]


@dataclass(frozen=True, slots=True)
class Admin:
    host: str = "127.0.0.1"
    port: int = 9000
    key_sha256: str | None = None  # of the key that /admin/reload requires


@dataclass(frozen=True, slots=True)
class PoolConfig(PoolBackends):
    """A pool that requests are routed to."""

    context_tokens: int | None = None  # None: no known limit
    max_in_flight: int = 256
    accepts: tuple[Modality, ...] = ("text", "tools", "image", "audio")


@dataclass(frozen=True, slots=True)
class Target:
    """What the threshold is adjusted to reach: one of the three."""

    large_share: float | None = None  # of the routed requests
    quality: float | None = None  # as a fraction of the last pool's, by the checkpoint's calibration
    cost: float | None = None  # as a fraction of sending everything to the last pool


@dataclass(frozen=True, slots=True)
class Group:
    """Where the name of a request's task is read."""

    from_: str  # key | header:NAME | metadata:NAME | system


@dataclass(frozen=True, slots=True)
class Routing:
    rule: Rule = "gain"
    threshold: float = 0.85
    target: Target | None = None  # instead of a threshold
    sticky: bool = True
    explore: float = 0.0
    on_overload: str = "share"
    unfamiliar: str = "share"  # where prompts go that are unlike those of the estimator's fit: share, explore, a pool
    group: Group | None = None  # None: no request's task is known
    expose_scores: bool = False


@dataclass(frozen=True, slots=True)
class Estimator:
    path: str = "builtin"
    deadline_ms: float = 50.0
    watch: bool = True
    candidate: str | None = None  # a second checkpoint, which scores live traffic but never decides


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect_s: float = 2.0
    first_token_s: float = 60.0  # streams only
    idle_s: float = 30.0  # streams only
    total_s: float = 600.0
    drain_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Retries:
    budget: float = 0.2  # retries per request, over the last ten seconds
    per_second: float = 10.0  # always allowed, however little traffic there is


@dataclass(frozen=True, slots=True)
class Limits:
    body_bytes: int = 4 * 1024 * 1024
    header_bytes: int = 64 * 1024
    max_queue: int = 512  # requests waiting for a pool's slot
    queue_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Records(RecordsDatabase):
    """Where finished requests are written: by default sqlite:///records.db beside the config. No section: nowhere."""

    prompts: Literal["none", "hash", "full"] = "none"
    hash_key_env: str | None = None  # the environment variable with HMAC's key, for prompts: hash and conversations
    retention_days: float = 30.0


@dataclass(frozen=True, slots=True)
class Config:
    pools: Mapping[str, PoolConfig]  # cheapest first
    version: Literal[1] = 1
    listen: Listen = field(default_factory=lambda: Listen(port=8000))
    admin: Admin = field(default_factory=Admin)
    routing: Routing = field(default_factory=Routing)
    estimator: Estimator = field(default_factory=Estimator)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: Retries = field(default_factory=Retries)
    limits: Limits = field(default_factory=Limits)
    auth: Auth | None = None  # None: open
    records: Records | None = None  # None: no records


def load_config(path: Path) -> Config:
    """Reads and checks a gateway.yaml. Relative paths in it are relative to its own directory.

    Raises:
        ValueError: one sentence that names the key at fault and the remedy.
    """
    raw = yaml_tree.read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping with 'version' and 'pools', found {yaml_tree.kind_of(raw)}")
    try:
        return parse_config(raw, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any], directory: Path = Path()) -> Config:
    """A checked tree from plain YAML values; see `load_config`."""
    values = dict(raw)
    if "version" not in values:
        raise ValueError("'version' is missing; write version: 1")
    if "auth" in values and values["auth"] is None:
        raise ValueError("auth is empty; write auth: none to serve without keys, or leave it out")
    if "records" in values and values["records"] is None:
        raise ValueError("records is empty; write records: {} to keep them in records.db, or leave it out")
    open_explicitly = values.get("auth") == "none"
    if open_explicitly:
        del values["auth"]
    config: Config = yaml_tree.build(Config, values, "")
    if config.auth is not None:
        config = dataclasses.replace(config, auth=with_keys_file(config.auth, directory))
    config = dataclasses.replace(config, estimator=_with_places(config.estimator, directory))
    if config.records is not None:
        config = dataclasses.replace(config, records=_with_database(config.records, directory))
    if config.routing.target is None and "target" in values.get("routing", {}):
        raise ValueError("routing.target is empty; write one of large_share, quality, cost under it")
    if config.routing.target is not None and "threshold" in values["routing"]:
        raise ValueError("routing has both threshold and target; a target moves the threshold, so write one of them")
    _check(config, open_explicitly)
    return config


def resolved_yaml(config: Config) -> str:
    """The tree as YAML with defaults filled in and no secrets: key digests are shortened, passwords hidden."""
    tree = yaml_tree.plain(config)
    if config.records is not None:
        tree["records"]["url"] = shown_url(config.records)
    else:
        del tree["records"]
    if config.routing.target is None:
        del tree["routing"]["target"]
    else:
        del tree["routing"]["threshold"]
    for key in (tree.get("auth") or {}).get("keys", []):
        key["sha256"] = key["sha256"][:8] + "…"
    if tree["admin"]["key_sha256"]:
        tree["admin"]["key_sha256"] = tree["admin"]["key_sha256"][:8] + "…"
    if config.auth is None:
        del tree["auth"]  # absent means open on a loopback address; elsewhere open needs "none"
        if not _is_loopback(config.listen.host):
            tree["auth"] = "none"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def key_digest(key: str) -> str:
    """The sha256 of an API key in hex, as configs hold it. It needs no salt: keys are 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


def routing_settings(config: Config) -> RoutingSettings:
    """The part of a config that records name."""
    routing, target = config.routing, config.routing.target
    bounds = (
        {}
        if target is None
        else {name: value for name, value in dataclasses.asdict(target).items() if value is not None}
    )
    pools = {name: ServedPool(pool.model, pool.cost) for name, pool in config.pools.items()}
    return RoutingSettings(routing.rule, routing.threshold if target is None else None, bounds, pools)


def last_pool(pools: Mapping[str, object]) -> str:
    """The most expensive pool, as pools are listed cheapest first."""
    return next(reversed(list(pools)))


def shown_url(records: Records) -> str | None:
    """The database's address without its password; None where an environment variable holds it."""
    if records.url is None:
        return None
    shown = re.sub(r"^(\w[\w+]*://[^/:]*):.*@", r"\1:***@", records.url)  # a password may hold '/', ':' and '?'
    return re.sub(r"(?i)([?&][^=&]*passw[^=&]*=)[^&]*", r"\1***", shown)


def _check(config: Config, open_explicitly: bool) -> None:
    _check_pools(config.pools)
    _check_routing(config.routing, config.pools)
    _check_numbers(config)
    _check_listen(config)
    if config.records is not None:
        _check_records(config.records)
    _check_auth(config, open_explicitly)


def _check_pools(pools: Mapping[str, PoolConfig]) -> None:
    if len(pools) < 2:
        raise ValueError(f"'pools' needs two pools or more, cheapest first, and has {len(pools)}")
    for name, pool in pools.items():
        check_backends(name, pool)
        at_least(pool.max_in_flight, 1, f"pools.{name}.max_in_flight")
        if pool.context_tokens is not None:
            at_least(pool.context_tokens, 1, f"pools.{name}.context_tokens")
        if "text" not in pool.accepts:
            raise ValueError(f"pools.{name}.accepts must contain text, beside whatever else the pool takes")
    _check_names(pools)
    for (name, pool), (after, next_pool) in itertools.pairwise(pools.items()):
        if next_pool.cost < pool.cost:
            raise ValueError(
                f"pools are listed cheapest first, but {after!r} ({next_pool.cost:g}) comes after {name!r} "
                f"({pool.cost:g})"
            )


def _check_names(pools: Mapping[str, PoolConfig]) -> None:
    """Checks that each name and model of a pool identifies one pool, and none is a name that requests routing."""
    models: dict[str, str] = {}
    for name, pool in pools.items():
        if name == "auto" or name.startswith("auto-"):
            raise ValueError(f"pools.{name}: a pool can't be called 'auto' or 'auto-…', those names ask for routing")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
            raise ValueError(f"pools.{name}: a pool's name is up to 63 letters, digits, '-', '_' and '.'")
        if pool.model in models or (pool.model in pools and pool.model != name):
            other = models.get(pool.model, pool.model)
            raise ValueError(
                f"pools.{name}.model {pool.model!r} also names pool {other!r}; requests could not tell them apart"
            )
        if pool.model == "auto" or re.fullmatch(r"auto-[0-9.]+", pool.model):
            raise ValueError(f"pools.{name}.model can't be {pool.model!r}, that name asks for routing")
        models[pool.model] = name


def _check_routing(routing: Routing, pools: Mapping[str, PoolConfig]) -> None:
    within(routing.threshold, 0, 1, "routing.threshold")
    within(routing.explore, 0, 1, "routing.explore")
    if routing.on_overload != "share" and routing.on_overload not in pools:
        raise ValueError(
            f"routing.on_overload is {routing.on_overload!r}; write share or a pool's name ({', '.join(pools)})"
        )
    if routing.unfamiliar not in ("share", "explore", *pools):
        raise ValueError(
            f"routing.unfamiliar is {routing.unfamiliar!r}; write share, explore or a pool's name ({', '.join(pools)})"
        )
    if routing.group is not None:
        check_source(routing.group.from_)
    if routing.target is None:
        return
    given = {name: value for name, value in yaml_tree.plain(routing.target).items() if value is not None}
    if len(given) != 1:
        raise ValueError("routing.target takes one of large_share, quality, cost")
    for name, value in given.items():
        within(value, 0, 1, f"routing.target.{name}")
    if "cost" in given:
        _check_cost(given["cost"], pools)


def _check_cost(wanted: float, pools: Mapping[str, PoolConfig]) -> None:
    prices = {name: pool.cost for name, pool in pools.items()}
    last = last_pool(prices)
    if prices[last] <= 0:
        raise ValueError("routing.target.cost needs a cost above 0 for the last pool")
    first = next(iter(prices))
    if wanted < prices[first] / prices[last]:
        raise ValueError(
            f"routing.target.cost {wanted:g} can't be met: with everything in pool {first} it is "
            f"{prices[first] / prices[last]:g}"
        )


def _check_numbers(config: Config) -> None:
    for section in ("timeouts", "retries"):
        tree = getattr(config, section)
        for item in dataclasses.fields(tree):
            floor = 0.0 if section == "retries" or item.name == "drain_s" else 0.001
            at_least(getattr(tree, item.name), floor, f"{section}.{item.name}")
    at_least(config.estimator.deadline_ms, 0, "estimator.deadline_ms")
    at_least(config.limits.body_bytes, 1024, "limits.body_bytes")
    at_least(config.limits.header_bytes, 1024, "limits.header_bytes")
    at_least(config.limits.max_queue, 0, "limits.max_queue")
    at_least(config.limits.queue_timeout_s, 0, "limits.queue_timeout_s")


def _check_listen(config: Config) -> None:
    listen, admin = config.listen, config.admin
    check_port(listen.port, "listen.port")
    check_port(admin.port, "admin.port")
    if (listen.host, listen.port) == (admin.host, admin.port) and listen.port:
        raise ValueError(f"listen and admin both name port {listen.port}; give admin.port another")


def _check_records(records: Records) -> None:
    if records.prompts == "hash" and records.hash_key_env is None:
        raise ValueError(
            "records.prompts: hash requires records.hash_key_env, the environment variable with HMAC's key"
        )
    addresses.check_secret(records.hash_key_env, "records.hash_key_env")
    if not records.retention_days > 0:
        raise ValueError(f"records.retention_days is {records.retention_days:g} and must be above 0")


def _check_auth(config: Config, open_explicitly: bool) -> None:
    if config.admin.key_sha256 is not None:
        check_digest(config.admin.key_sha256, "admin.key_sha256")
    if config.auth is not None:
        check_keys(config.auth)
    elif not open_explicitly and not _is_loopback(config.listen.host):
        raise ValueError(
            f"listen.host {config.listen.host} can be reached from other machines and auth is absent; configure "
            "auth.keys_file (depo-gateway keys new NAME makes a key), or write auth: none to allow access without keys"
        )


def _with_places(estimator: Estimator, directory: Path) -> Estimator:
    """Relative paths made absolute from the config's own directory."""

    def placed(path: str) -> str:
        return path if path == "builtin" else str(directory / Path(path).expanduser())

    candidate = None if estimator.candidate is None else placed(estimator.candidate)
    return dataclasses.replace(estimator, path=placed(estimator.path), candidate=candidate)


def _with_database(records: Records, directory: Path) -> Records:
    if records.url is None and records.url_env is None:
        records = dataclasses.replace(records, url="sqlite:///records.db")
    return resolve_database(records, directory, "records.url" if records.url_env is None else "records.url_env")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
