"""The documentation names what exists, and all of it."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.rl.metrics import RunMetrics

ROOT = Path(__file__).parent.parent
OPERATIONS = (ROOT / "docs/operations.md").read_text()
LEARNER = OPERATIONS.split("## The learner")[1].split("\n## ")[0]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/*/*.md", "examples/*.md", "helm/*.md")
    for path in ROOT.glob(pattern)
)


def settings(kind: Any = config.Config, prefix: str = "") -> Iterator[str]:
    """Every key of the config tree, as the documentation writes it."""
    for name, hint in typing.get_type_hints(kind).items():
        key, inner = prefix + name, hint
        if typing.get_origin(hint) is Mapping:
            key, inner = f"{key}.NAME", typing.get_args(hint)[1]
        elif typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)[0]
            key += "[]" if dataclasses.is_dataclass(inner) else ""
        elif options := [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]:
            inner = options[0]
        if dataclasses.is_dataclass(inner):
            yield from settings(inner, key + ".")
        else:
            yield key


def metrics() -> dict[str, set[str]]:
    """Every metric's name, as Prometheus shows it, and its labels."""
    names = {}
    registries = [Metrics("0").registry, LearnerMetrics("0").registry, RunMetrics("0").registry]
    for metric in [metric for registry in registries for metric in registry._collector_to_names]:
        name = metric._name + ("_total" if metric._type == "counter" else "")
        names[name] = set(metric._labelnames)
    return names


def test_every_setting_is_documented() -> None:
    known = list(settings())
    assert {"version", "pools.NAME.backends[].api_key_env", "auth.keys[].sha256", "timeouts.drain_s"} <= set(known)
    table = OPERATIONS.split("## Settings")[1].split("\n## ")[0]
    missing = [key for key in known if f"`{key}`" not in table]
    assert not missing


def test_no_setting_is_documented_that_does_not_exist() -> None:
    table = OPERATIONS.split("## Settings")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert named - set(settings()) == {"pools.NAME"}


def test_every_setting_of_the_learner_is_documented_and_no_other() -> None:
    known = set(settings(learner_settings.LearnerSettings))
    assert {"shadow.share", "pools.NAME.backends[].url", "refresh.learn.gate.least", "listen.port"} <= known
    table = LEARNER.split("| Key |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`([^`]+)`", row)} == known


def test_every_metric_is_documented_with_its_labels() -> None:
    for name, labels in metrics().items():
        found = re.search(rf"`{name}(?:\{{([a-z_,]+)\}})?` \|", OPERATIONS)
        assert found is not None, name
        assert set((found[1] or "").split(",")) - {""} == labels, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_metric_named_exists(path: Path) -> None:
    known = set(metrics())
    for name in re.findall(r"\b(?:gateway|learner|training)_[a-z_]+[a-z]\b(?!\.py)", path.read_text()):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or base in known, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"https?:|#|mailto:", target):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_every_error_code_is_documented() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    codes = set(re.findall(r"ApiError\(\s*\d{3},(?:[^()]|\([^()]*\))*?\"([a-z_]+)\"(?:,|\s*\))", sources))
    assert {"invalid_json", "timeout", "missing_api_key"} <= codes
    table = OPERATIONS.split("## Errors")[1].split("\n## ")[0]
    assert sorted(code for code in codes if f"`{code}`" not in table and code != "client_gone") == []


def test_the_example_of_a_learner_is_taken() -> None:
    found = learner_settings.load_settings(ROOT / "examples/learner.yaml")
    assert list(found.pools) == ["small", "large"]
    assert (found.shadow.share, found.judge.kind) == (0.1, "model")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("gateway*.yaml")), ids=lambda path: path.name)
def test_example_configs_are_taken(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    if "keys_file" in (raw.get("auth") or {}):
        raw["auth"] = "none"  # the keys are the reader's own
    assert len(config.parse_config(raw, path.parent).pools) >= 2


def test_the_reasons_listed_are_those_of_the_table() -> None:
    listed = OPERATIONS.split("`x-depo-reason` and the label `reason` of decisions are one of: ")[1].split("\n\n")[0]
    outside_brackets = re.sub(r"\([^)]*\)", "", listed)
    assert re.findall(r"`(\w+)`", outside_brackets) == [reason.value for reason in Reason]


def values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The chart's values, as helm/README.md names them: down to what is gateway.yaml's or a pod's own."""
    for name, value in tree.items():
        key = prefix + name
        if key in ("config", "learner.config") or name in (*POD_KEYS, "image", "resources", "strategy"):
            yield key
        elif isinstance(value, dict) and value and name not in ("labels", "annotations"):
            yield from values(value, key + ".")
        else:
            yield key


POD_KEYS = (
    *("podLabels", "podAnnotations", "nodeSelector", "tolerations", "affinity", "topologySpreadConstraints"),
    *("priorityClassName", "runtimeClassName", "podSecurityContext", "securityContext"),
    *("extraEnv", "extraEnvFrom", "extraVolumes", "extraVolumeMounts"),
)


def test_every_value_of_the_chart_is_documented_and_no_other() -> None:
    chart = yaml.safe_load((ROOT / "helm/values.yaml").read_text())
    text = (ROOT / "helm/README.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    entries = {re.sub(r"^backends\.\w+\.", "backends.POOL.", key) for key in values(chart)}
    known = {key for key in entries if key.rpartition(".")[2] not in POD_KEYS}
    known -= {key for key in known if key.startswith("backends.POOL.weights")}  # one default among backendDefaults
    assert named - {"backendDefaults"} == known
    assert all(f"`{key}`" in text for key in POD_KEYS)


def test_every_alert_is_named_in_the_operators_document() -> None:
    groups = yaml.safe_load((ROOT / "helm/rules/alerts.yaml").read_text())["groups"]
    known = {rule["alert"] for group in groups for rule in group["rules"]}
    section = OPERATIONS.split("## Alerts")[1].split("\n## ")[0]
    assert set(re.findall(r"\[(Depo\w+)\]", section)) == known
    assert f"has {len(known)} alerts" in section
