"""Every setting of the gateway, as one frozen tree read from gateway.yaml.

The tree is closed: an unknown key stops start-up and names itself and the nearest known key. Scalars are checked too
(`threshold: "0.6"` is a mistake, not a number).
"""

import dataclasses
import difflib
import hashlib
import ipaddress
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union
from urllib.parse import urlsplit

import yaml

Modality = Literal["text", "tools", "image", "audio"]
Rule = Literal["gain", "difficulty"]


@dataclass(frozen=True, slots=True)
class Listen:
    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True, slots=True)
class Admin:
    host: str = "127.0.0.1"
    port: int = 9000
    key_sha256: str | None = None  # of the key that /admin/reload wants


@dataclass(frozen=True, slots=True)
class BackendConfig:
    url: str  # with or without /v1
    api_key_env: str | None = None  # the environment variable that holds the backend's own key


@dataclass(frozen=True, slots=True)
class PoolConfig:
    model: str  # what the backends call it
    backends: tuple[BackendConfig, ...]
    cost: float = 1.0  # any unit, per 1,000 tokens
    context_tokens: int | None = None  # None: no limit known
    max_in_flight: int = 256
    accepts: tuple[Modality, ...] = ("text", "tools", "image", "audio")


@dataclass(frozen=True, slots=True)
class Routing:
    rule: Rule = "gain"
    threshold: float = 0.85
    sticky: bool = True
    explore: float = 0.0
    on_overload: str = "share"
    expose_scores: bool = False


@dataclass(frozen=True, slots=True)
class Estimator:
    path: str = "builtin"
    deadline_ms: float = 50.0
    watch: bool = True


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
    per_second: float = 10.0  # and this many whatever the traffic


@dataclass(frozen=True, slots=True)
class Limits:
    body_bytes: int = 4 * 1024 * 1024
    header_bytes: int = 64 * 1024
    max_queue: int = 512  # requests that wait for a pool's slot
    queue_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Auth:
    keys_file: str | None = None
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    pools: Mapping[str, PoolConfig]  # cheapest first
    version: Literal[1] = 1
    listen: Listen = field(default_factory=Listen)
    admin: Admin = field(default_factory=Admin)
    routing: Routing = field(default_factory=Routing)
    estimator: Estimator = field(default_factory=Estimator)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: Retries = field(default_factory=Retries)
    limits: Limits = field(default_factory=Limits)
    auth: Auth | None = None  # None: open


def load(path: Path) -> Config:
    """Reads and checks a gateway.yaml. Relative paths in it are relative to its own directory.

    Raises:
        ValueError: one sentence that names the key at fault and the remedy.
    """
    raw = _read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping with 'version' and 'pools', found {_kind(raw)}")
    try:
        return parse(raw, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse(raw: Mapping[str, Any], directory: Path = Path()) -> Config:
    """A checked tree from plain YAML values; see `load`."""
    values = dict(raw)
    if "version" not in values:
        raise ValueError("'version' is missing; write version: 1")
    open_aloud = values.get("auth") == "none"
    if open_aloud:
        del values["auth"]
    config: Config = _build(Config, values, "")
    if config.auth is not None:
        config = dataclasses.replace(config, auth=_with_keys_file(config.auth, directory))
    if config.estimator.path != "builtin":
        resolved = directory / Path(config.estimator.path).expanduser()
        config = dataclasses.replace(config, estimator=dataclasses.replace(config.estimator, path=str(resolved)))
    _check(config, open_aloud)
    return config


def resolved(config: Config) -> str:
    """The tree as YAML, defaults filled in, key digests shortened so that a paste into a ticket gives nothing away."""
    tree = _plain(config)
    for key in (tree.get("auth") or {}).get("keys", []):
        key["sha256"] = key["sha256"][:8] + "…"
    if tree["admin"]["key_sha256"]:
        tree["admin"]["key_sha256"] = tree["admin"]["key_sha256"][:8] + "…"
    if config.auth is None:
        del tree["auth"]  # absent means open on a loopback address; only who said "none" gets it back
        if not _is_loopback(config.listen.host):
            tree["auth"] = "none"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def key_digest(key: str) -> str:
    """What a config holds of an API key: sha256 over its UTF-8 bytes, in hex. Keys are 256 random bits, so no salt."""
    return hashlib.sha256(key.encode()).hexdigest()


def _check(config: Config, open_aloud: bool) -> None:
    pools = config.pools
    if len(pools) < 2:
        raise ValueError(f"'pools' needs two pools or more, cheapest first, and has {len(pools)}")
    models: dict[str, str] = {}
    for name, pool in pools.items():
        if name == "auto" or name.startswith("auto-"):
            raise ValueError(f"pools.{name}: a pool can't be called 'auto' or 'auto-…', those names ask for routing")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
            raise ValueError(f"pools.{name}: a pool's name is up to 63 letters, digits, '-', '_' and '.'")
        if not pool.model:
            raise ValueError(f"pools.{name}.model is empty; write what the backend calls the model")
        if pool.model in models or (pool.model in pools and pool.model != name):
            other = models.get(pool.model, pool.model)
            raise ValueError(
                f"pools.{name}.model {pool.model!r} also names pool {other!r}; requests could not tell them apart"
            )
        if pool.model == "auto" or re.fullmatch(r"auto-[0-9.]+", pool.model):
            raise ValueError(f"pools.{name}.model can't be {pool.model!r}, that name asks for routing")
        models[pool.model] = name
        if not pool.backends:
            raise ValueError(f"pools.{name}.backends is empty; list at least one url")
        for index, backend in enumerate(pool.backends):
            where = f"pools.{name}.backends[{index}]"
            _check_url(backend.url, where)
            if backend.api_key_env is not None:
                _check_secret(backend.api_key_env, f"{where}.api_key_env")
        _at_least(pool.cost, 0, f"pools.{name}.cost")
        _at_least(pool.max_in_flight, 1, f"pools.{name}.max_in_flight")
        if pool.context_tokens is not None:
            _at_least(pool.context_tokens, 1, f"pools.{name}.context_tokens")
        if "text" not in pool.accepts:
            raise ValueError(f"pools.{name}.accepts must contain text; what else it takes comes beside it")
    costs = [(pool.cost, name) for name, pool in pools.items()]
    for (cost, name), (dearer, after) in itertools.pairwise(costs):
        if dearer < cost:
            raise ValueError(
                f"pools are listed cheapest first, but {after!r} ({dearer:g}) comes after {name!r} ({cost:g})"
            )
    routing = config.routing
    _within(routing.threshold, 0, 1, "routing.threshold")
    _within(routing.explore, 0, 1, "routing.explore")
    if routing.on_overload != "share" and routing.on_overload not in pools:
        raise ValueError(
            f"routing.on_overload is {routing.on_overload!r}; write share or a pool's name ({', '.join(pools)})"
        )
    for section in ("timeouts", "retries"):
        tree = getattr(config, section)
        for item in dataclasses.fields(tree):
            floor = 0.0 if section == "retries" or item.name == "drain_s" else 0.001
            _at_least(getattr(tree, item.name), floor, f"{section}.{item.name}")
    _at_least(config.estimator.deadline_ms, 0, "estimator.deadline_ms")
    _at_least(config.limits.body_bytes, 1024, "limits.body_bytes")
    _at_least(config.limits.header_bytes, 1024, "limits.header_bytes")
    _at_least(config.limits.max_queue, 0, "limits.max_queue")
    _at_least(config.limits.queue_timeout_s, 0, "limits.queue_timeout_s")
    for section in ("listen", "admin"):
        _within(getattr(config, section).port, 0, 65535, f"{section}.port")
    if config.listen == Listen(config.admin.host, config.admin.port) and config.listen.port:
        raise ValueError(f"listen and admin both name port {config.listen.port}; give admin.port another")
    _check_auth(config, open_aloud)


def _check_auth(config: Config, open_aloud: bool) -> None:
    if config.admin.key_sha256 is not None:
        _check_digest(config.admin.key_sha256, "admin.key_sha256")
    if config.auth is None:
        if not open_aloud and not _is_loopback(config.listen.host):
            raise ValueError(
                f"listen.host {config.listen.host} can be reached from other machines and auth is absent; "
                "configure auth.keys_file (depo-gateway keys new NAME makes a key), or write auth: none if it is meant"
            )
        return
    if not config.auth.keys:
        raise ValueError("auth has no keys; add one with depo-gateway keys new NAME, or write auth: none")
    seen: dict[str, str] = {}
    for index, key in enumerate(config.auth.keys):
        if not key.name:
            raise ValueError(f"auth.keys[{index}].name is empty")
        _check_digest(key.sha256, f"auth.keys[{index}].sha256 (key {key.name!r})")
        if key.name in seen.values() or key.sha256 in seen:
            raise ValueError(f"auth.keys[{index}] repeats the name or the digest of an earlier key ({key.name!r})")
        seen[key.sha256] = key.name


def _with_keys_file(auth: Auth, directory: Path) -> Auth:
    if auth.keys_file is None:
        return auth
    path = directory / Path(auth.keys_file).expanduser()
    raw = _read_yaml(path)
    if isinstance(raw, dict) and set(raw) == {"keys"}:
        raw = raw["keys"]
    if not isinstance(raw, list):
        raise ValueError(f"auth.keys_file {path}: expected a list of {{name, sha256}}, found {_kind(raw)}")
    return Auth(str(path), auth.keys + tuple(_build(Key, item, f"{path}[{i}]") for i, item in enumerate(raw)))


def _check_digest(value: str, where: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{where} is not a sha256 in hex; depo-gateway keys new NAME prints the line to paste")


def _check_secret(variable: str, where: str) -> None:
    value = os.environ.get(variable, "")
    if not value:
        raise ValueError(f"{where}: the environment variable {variable!r} is not set")
    if not value.isascii() or not value.isprintable() or value != value.strip():
        raise ValueError(f"{where}: {variable!r} holds a line's end, blanks around it or non-ASCII; set the bare key")


def _check_url(url: str, where: str) -> None:
    if "@" in url:  # and not shown here: it would also stand in metrics and logs
        raise ValueError(f"{where}.url holds an '@'; give the backend's key by api_key_env, not in the address")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        valid = valid and parts.port != 0 and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{where}.url {url!r} is not an http or https address such as http://vllm-small:8000")


def _at_least(value: float, floor: float, where: str) -> None:
    if not value >= floor:
        raise ValueError(f"{where} is {value:g} and must be at least {floor:g}")


def _within(value: float, low: float, high: float, where: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{where} is {value:g} and must be between {low:g} and {high:g}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what `<<` brings in may be overridden
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"can't read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _build(kind: Any, value: Any, where: str) -> Any:
    """Checks `value` against the annotation `kind` and builds it. `where` names the place in messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_tree(kind, value, where)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise ValueError(f"{where} is {value!r}; write one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            if where == "auth":
                raise ValueError("auth is empty; write auth: none to serve without keys, or leave it out")
            return None
        return _build(next(option for option in arguments if option is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_kind(value)}; write a list")
        return tuple(_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_kind(value)}; write a mapping from names")
        for name in value:
            if not isinstance(name, str):  # YAML reads on, no and 7 as something else
                raise ValueError(f"{where} has the name {name!r}, which YAML takes for {_kind(name)}; put it in quotes")
        return {name: _build(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {_kind(value)}; write {_KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; write a finite number")
    return value


def _build_tree(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the config'} is {_kind(value)}; write a mapping")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            path = f"{where}.{name}" if where else str(name)
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            raise ValueError(f"unknown key {path!r}; {hint}")
    built = {}
    for name, item in fields.items():
        path = f"{where}.{name}" if where else name
        if name in value:
            built[name] = _build(hints[name], value[name], path)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path!r} is missing")
    return kind(**built)


_KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    names = {dict: "a mapping", list: "a list", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(type(value), f"the text {value!r}" if isinstance(value, str) else f"a {type(value).__name__}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
