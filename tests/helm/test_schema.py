"""helm/values.schema.json is closed, says what the programs' own loaders say, and refuses a typing mistake by name."""

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from jsonschema import Draft7Validator

from depo_gateway.estimator.configuration import yaml_tree
from depo_gateway.gateway import config
from depo_gateway.training.judging.label_sources import judge_kinds
from depo_gateway.training.online import settings as learner_settings
from tests.helm.chart import CHART, merged, nested

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
GATEWAY = SCHEMA["definitions"]["gatewaySettings"]
LEARNER = SCHEMA["definitions"]["learnerSettings"]
MISPLACED = {"$ref": "#/definitions/elsewhere"}  # taken for the templates to refuse: test_refusals.py

# What the chart writes itself, or what would put a secret into a ConfigMap.
NOT_OF_GATEWAY = {
    "pools.NAME.backends[].url",
    "pools.NAME.backends[].api_key_env",
    "records.url",
    "records.url_env",
    "records.hash_key_env",
    "auth.keys_file",
}
NOT_OF_LEARNER = {
    "records.url",
    "records.url_env",
    "pools.NAME.model",
    "pools.NAME.cost",
    "listen.host",
} | {f"pools.NAME.backends[].{key}" for key in ("url", "api_key_env")}
PROBES = (
    *(-5, 0, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 1.5, 2, 19, 20, 49, 50, 51, 99, 100, 101, 1023, 1024),
    *(65535, 65536, 10**9),
    *("", "text", "0.5", True, [], {}, None),
)


def resolved(node: Any) -> Any:
    """The node, or what its $ref leads to."""
    while "$ref" in node:
        target: Any = SCHEMA
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        node = target
    return node


def settings(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a tree of settings with its annotation."""
    for name, hint in typing.get_type_hints(kind).items():
        key, inner = prefix + yaml_tree.key_of(name), hint
        if typing.get_origin(hint) is Mapping:
            key, inner = f"{key}.NAME", typing.get_args(hint)[1]
        elif typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            key, inner = f"{key}[]", typing.get_args(hint)[0]
        elif options := [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]:
            inner = options[0]
        if dataclasses.is_dataclass(inner):
            yield from settings(inner, key + ".")
        else:
            yield key, hint


def properties(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a part of the schema takes, with its own schema; named as `settings` names them."""
    for name, found in resolved(node)["properties"].items():
        if found == MISPLACED:
            continue
        key, inner = prefix + name, resolved(found)
        if isinstance(inner.get("additionalProperties"), dict):
            key, inner = f"{key}.NAME", resolved(inner["additionalProperties"])
        elif inner.get("type") == "array" and "properties" in resolved(inner["items"]):
            key, inner = f"{key}[]", resolved(inner["items"])
        if "properties" in inner:
            yield from properties(inner, key + ".")
        else:
            yield key, inner


def json_types(hint: Any) -> set[str]:
    options = typing.get_args(hint) if typing.get_origin(hint) not in (None, tuple, Literal) else (hint,)
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    found = set()
    for option in options:
        origin = typing.get_origin(option)
        found.add("array" if origin is tuple else "enum" if origin is Literal else names[option])
    return found


def test_every_setting_of_the_gateway_is_in_the_schema_and_no_other() -> None:
    known = {key for key, _ in settings(config.Config)}
    assert {"routing.target.cost", "pools.NAME.accepts", "auth.keys[].sha256"} <= known
    assert known - NOT_OF_GATEWAY == {key for key, _ in properties(GATEWAY)}
    assert known >= NOT_OF_GATEWAY


def test_every_setting_of_the_learner_is_in_the_schema_and_no_other() -> None:
    known = {key for key, _ in settings(learner_settings.LearnerSettings)}
    assert known - NOT_OF_LEARNER == {key for key, _ in properties(LEARNER)}
    assert known >= NOT_OF_LEARNER


@pytest.mark.parametrize(("tree", "part"), [(config.Config, GATEWAY), (learner_settings.LearnerSettings, LEARNER)])
def test_settings_have_the_loaders_types(tree: Any, part: Any) -> None:
    hints = dict(settings(tree))
    for key, node in properties(part):
        if key == "judge.kind":  # from the table of label sources
            assert tuple(node["enum"]) == judge_kinds()
            continue
        if typing.get_origin(hints[key]) is Literal:
            options = {node["const"]} if "const" in node else set(node["enum"])
            assert options == set(typing.get_args(hints[key])), key
            continue
        found = {node["type"]} if isinstance(node["type"], str) else set(node["type"])
        wanted = json_types(hints[key])
        assert found == (wanted - {"null"} if key.startswith("routing.target.") else wanted), key
        if "array" in found:
            literal = typing.get_args(hints[key])[0]
            assert set(resolved(node["items"])["enum"]) == set(typing.get_args(literal))


GATEWAY_BASE: dict[str, Any] = {
    "version": 1,
    "auth": "none",
    "pools": {
        "small": {"model": "s", "backends": [{"url": "http://s"}], "cost": 0},
        "large": {"model": "l", "backends": [{"url": "http://l"}], "cost": 10**9},
    },
}


def gateway_takes(key: str, value: Any) -> bool:
    key = key.replace("pools.NAME", "pools.small")
    if key.endswith(".cost") and key.startswith("pools"):
        key = "pools.large.cost"  # the dearer one may have any
    more = nested(key, value)
    if key.startswith("auth.keys[]."):
        more = {"auth": {"keys": [{"name": "a", "sha256": "0" * 64} | {key.removeprefix("auth.keys[]."): value}]}}
    if key in ("routing.on_overload", "routing.unfamiliar") and value and isinstance(value, str):
        return True  # a pool's name; which there are is not the schema's to know
    if key.startswith("estimator.") and value == "":
        return False  # the config's own directory, which nobody means
    try:
        config.parse_config(merged(GATEWAY_BASE, more), Path("/nowhere"))
    except ValueError:
        return False
    return True


def learner_takes(key: str, value: Any) -> bool:
    if key in ("judge.pool", "reference") and value == "":
        return False
    name = value if key == "judge.pool" and isinstance(value, str) else "small"
    below: dict[str, Any] = {"pools": {name: GATEWAY_BASE["pools"]["small"]}, "records": {"url": "sqlite:///a"}}
    if key == "judge.pool" and value is not None:
        below |= nested("judge.kind", "model")
    if key in ("judge.rubric", "judge.max_tokens") and value is not None:
        below |= {"judge": {"kind": "model", "pool": "small"}}
    if key == "refresh.learn.newest":
        below |= nested("refresh.learn.min_labels", 20)
    elif key == "refresh.learn.min_labels":
        below |= nested("refresh.learn.newest", 10**9)
    try:
        learner_settings.parse_settings(merged(below, nested(key, value)), Path("/nowhere"))
    except ValueError:
        return False
    return True


# Where the schema is narrower on purpose: no root, so no low port; and a database's address comes from a Secret.
LOW = [value for value in PROBES if isinstance(value, int) and 0 <= value < 1024]
NARROWER = {"listen.port": LOW, "admin.port": LOW, "listen.host": [""], "admin.host": [""]}
ELSEWHERE = {"judge.url", "judge.api_key_env"}  # have a meaning only beside judge.kind: webhook


@pytest.mark.parametrize(
    ("part", "takes"), [(GATEWAY, gateway_takes), (LEARNER, learner_takes)], ids=["gateway", "learner"]
)
def test_the_schema_takes_what_the_loader_takes(part: Any, takes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for key, node in properties(part):
        if key in ELSEWHERE:
            continue
        validator = Draft7Validator({**node, "definitions": SCHEMA["definitions"]})
        for value in PROBES:
            if value is None and key.startswith("routing.target."):
                continue  # an absent one, to the loader
            if value in NARROWER.get(key, []) and type(value) is not bool:
                assert not validator.is_valid(value), f"{key}: {value!r}"
                continue
            compared += 1
            assert validator.is_valid(value) == takes(key, value), f"{key}: {value!r}"
    assert compared > 700


def test_the_schema_is_closed() -> None:
    Draft7Validator.check_schema(SCHEMA)
    free = set()

    def look(node: Any, where: str) -> None:
        if isinstance(node, list):
            for index, item in enumerate(node):
                look(item, f"{where}[{index}]")
            return
        if not isinstance(node, dict):
            return
        kinds = node.get("type", ())
        if "object" in ([kinds] if isinstance(kinds, str) else kinds) and node.get("additionalProperties") in (
            None,
            True,
        ):
            free.add(where)
        for key, item in node.items():
            look(item, f"{where}.{key}")

    look(SCHEMA, "")
    assert free == {  # Kubernetes' own, which the API server checks
        ".properties.global",
        ".properties.gateway.properties.autoscaling.properties.behavior",
        ".properties.extraObjects.items",
        *(
            f".definitions.volume.properties.{key}"
            for key in (
                "configMap",
                "csi",
                "downwardAPI",
                "emptyDir",
                "ephemeral",
                "persistentVolumeClaim",
                "projected",
                "secret",
            )
        ),
        *(f".definitions.affinity.properties.{key}" for key in ("nodeAffinity", "podAffinity", "podAntiAffinity")),
    }


def test_every_key_of_the_chart_stands_in_values_yaml() -> None:
    def look(node: Any, values: Any, where: str) -> None:
        for key, found in resolved(node).get("properties", {}).items():
            if where + key in ("global", "config", "learner.config", "backends") or found == MISPLACED:
                continue
            if where.endswith("resources."):
                continue
            assert key in values, where + key
            if isinstance(values[key], dict) and values[key]:
                look(found, values[key], f"{where}{key}.")

    look(SCHEMA, DEFAULTS, "")


def test_a_backend_has_the_keys_of_the_defaults_and_three_more() -> None:
    found = set(SCHEMA["definitions"]["backend"]["properties"])
    assert found == set(DEFAULTS["backendDefaults"]) | {"deploy", "url", "model"}


def test_pods_have_the_same_keys_everywhere() -> None:
    common = set(DEFAULTS["gateway"]) & set(DEFAULTS["learner"]) & set(DEFAULTS["backendDefaults"])
    assert {"podLabels", "extraEnv", "securityContext", "runtimeClassName"} <= common
    for key in common - {"image", "resources"}:
        nodes = [
            resolved(SCHEMA["properties"][part]["properties"][key])
            for part in ("gateway", "learner", "backendDefaults")
        ]
        assert nodes[0] == nodes[1] == nodes[2], key
