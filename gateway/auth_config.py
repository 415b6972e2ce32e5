"""The `auth` section: API keys, in the config or in a keys file. Every mistake is a ValueError of one sentence."""

import re
from dataclasses import dataclass
from pathlib import Path

from depo_gateway.estimator.configuration import yaml_tree
from depo_gateway.estimator.configuration.yaml_tree import within


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    sha256: str
    requests_per_minute: float | None = None
    large_share: float | None = None  # the largest share of this key's requests that the last pool may serve


@dataclass(frozen=True, slots=True)
class Auth:
    keys_file: str | None = None
    keys: tuple[Key, ...] = ()


def with_keys_file(auth: Auth, directory: Path) -> Auth:
    """The section with the keys of its file added; a relative path is taken from `directory`."""
    if auth.keys_file is None:
        return auth
    path = directory / Path(auth.keys_file).expanduser()
    raw = yaml_tree.read_yaml(path)
    if isinstance(raw, dict) and set(raw) == {"keys"}:
        raw = raw["keys"]
    if not isinstance(raw, list):
        raise ValueError(f"auth.keys_file {path}: expected a list of {{name, sha256}}, found {yaml_tree.kind_of(raw)}")
    return Auth(str(path), auth.keys + tuple(yaml_tree.build(Key, item, f"{path}[{i}]") for i, item in enumerate(raw)))


def check_keys(auth: Auth) -> None:
    """Raises ValueError unless there are keys, each complete, within its bounds and unique."""
    if not auth.keys:
        raise ValueError("auth has no keys; add one with depo-gateway keys new NAME, or write auth: none")
    seen: dict[str, str] = {}
    for index, key in enumerate(auth.keys):
        if not key.name:
            raise ValueError(f"auth.keys[{index}].name is empty")
        check_digest(key.sha256, f"auth.keys[{index}].sha256 (key {key.name!r})")
        if key.requests_per_minute is not None and not key.requests_per_minute > 0:
            raise ValueError(f"auth.keys[{index}].requests_per_minute must be above 0 (key {key.name!r})")
        if key.large_share is not None:
            within(key.large_share, 0, 1, f"auth.keys[{index}].large_share (key {key.name!r})")
        if key.name in seen.values() or key.sha256 in seen:
            raise ValueError(f"auth.keys[{index}] repeats the name or the digest of an earlier key ({key.name!r})")
        seen[key.sha256] = key.name


def check_digest(value: str, where: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{where} is not a sha256 in hex; depo-gateway keys new NAME prints the line to paste")
