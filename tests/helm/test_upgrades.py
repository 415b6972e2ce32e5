"""`helm upgrade` from any values to any other: what Kubernetes lets nobody change stays, and what must follow does."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm import chart
from tests.helm.cases import CASES
from tests.helm.chart import CHART, Manifest

# Other names make another release; a volume's class can't change, and Helm says so.
NOT_SWITCHED = {"long-release-name", "release-of-the-chart's-name", "names", "full-name", "backend-keys"}
SWITCHES = [name for name in CASES if name not in NOT_SWITCHED]


def fixed(item: Manifest) -> Any:
    """The part of an object that the API server lets nobody change."""
    spec = item.get("spec", {})
    match item["kind"]:
        case "Deployment":
            return spec["selector"]
        case "PersistentVolumeClaim":
            return {key: spec.get(key) for key in ("accessModes", "storageClassName", "volumeName", "selector")}
        case "Service":
            return {key: spec.get(key) for key in ("clusterIP", "ipFamilies")}
        case "Job":
            return spec
        case "ConfigMap":
            return item.get("immutable")
        case _:
            return None


def test_nothing_changes_that_can_not() -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for name in SWITCHES:
        for item in chart.rendered(CASES[name]):
            key, part = f"{item['apiVersion']} {chart.name_of(item)}", fixed(item)
            first, before = seen.setdefault(key, (name, part))
            assert part == before, f"{key}: {first} -> {name}"
    assert len(seen) > 30


def test_selectors_are_as_they_were_published() -> None:
    """Whoever changes these breaks `helm upgrade` for everyone who has the chart installed."""
    manifests = chart.rendered(CASES["defaults"])
    usual = {"app.kubernetes.io/name": "depo-gateway", "app.kubernetes.io/instance": "depo"}
    assert {
        item["metadata"]["name"]: item["spec"]["selector"]["matchLabels"]
        for item in chart.of_kind(manifests, "Deployment")
    } == {
        "depo-depo-gateway": usual | {"app.kubernetes.io/component": "gateway"},
        "depo-depo-gateway-learner": usual | {"app.kubernetes.io/component": "learner"},
        "depo-depo-gateway-small": usual | {"app.kubernetes.io/component": "backend", "depo-gateway/pool": "small"},
        "depo-depo-gateway-large": usual | {"app.kubernetes.io/component": "backend", "depo-gateway/pool": "large"},
    }
    assert {item["metadata"]["name"] for item in chart.of_kind(manifests, "PersistentVolumeClaim")} == {
        f"depo-depo-gateway-{name}" for name in ("checkpoints", "records", "weights-small", "weights-large")
    }
    assert {item["metadata"]["name"] for item in chart.of_kind(manifests, "Service")} == {
        f"depo-depo-gateway{suffix}" for suffix in ("", "-admin", "-small", "-large")
    }


@pytest.mark.parametrize("name", ["defaults", "cpu", "production", "every-setting", "keda", "cron", "one-deployed"])
def test_a_new_version_of_the_chart_starts_no_pod_anew(name: str, tmp_path: Path) -> None:
    """Pods carry nothing that changes with the chart's version alone: vLLM takes minutes to load."""
    before = {pod.owner: (pod.metadata, pod.spec) for pod in chart.pods(chart.rendered(CASES[name]))}
    after = {pod.owner: (pod.metadata, pod.spec) for pod in chart.pods(of_version(tmp_path, "9.9.9", CASES[name]))}
    assert before.keys() == after.keys()
    for owner, (metadata, spec) in before.items():
        if owner.startswith("Pod/"):
            continue
        assert after[owner] == (metadata, spec), owner


def of_version(tmp_path: Path, version: str, values: chart.Values) -> list[Manifest]:
    """The chart with another version and the same appVersion."""
    copied = tmp_path / "helm"
    shutil.copytree(CHART, copied)
    about = yaml.safe_load((copied / "Chart.yaml").read_text())
    (copied / "Chart.yaml").write_text(yaml.safe_dump(about | {"version": version}))
    return chart.parsed(chart.run("template", values, chart=copied).stdout)


def checksums(values: chart.Values) -> dict[str, str]:
    """A pod's template as one string, by component and pool."""
    return {
        f"{pod.component} {pod.labels.get('depo-gateway/pool', '')}".strip(): json.dumps([pod.metadata, pod.spec])
        for pod in chart.pods(chart.rendered(values))
        if pod.component != "test"
    }


EVERYONE = {"gateway", "learner", "backend small", "backend large"}


@pytest.mark.parametrize(
    ("changed", "restarted"),
    [
        ("config.routing.threshold=0.5", {"gateway"}),
        ("config.retries.budget=0.5", {"gateway"}),
        ("config.pools.small.cost=0.5", {"gateway", "learner"}),
        ("config.pools.small.max_in_flight=8", {"gateway"}),
        ("learner.config.shadow.share=0.5", {"learner"}),
        ("learner.resources.limits.memory=8Gi", {"learner"}),
        ("backends.small.replicas=0", set()),
        ("gateway.service.type=NodePort", set()),
        ("monitoring.serviceMonitor.interval=30s", set()),
        ("networkPolicy.enabled=false", set()),
        ("huggingFace.existingSecret=hf", {"backend small", "backend large"}),
        ("backends.large.apiKey.existingSecret=key", {"gateway", "learner", "backend large"}),
        ("records.hashKey.existingSecret=key", {"gateway"}),
        ("gateway.image.tag=2.0.0", {"gateway"}),
        ("commonLabels.team=a", EVERYONE),
    ],
)
def test_exactly_the_pods_restart_that_read_what_changed(changed: str, restarted: set[str]) -> None:
    path, _, value = changed.partition("=")
    before = checksums(CASES["defaults"])
    after = checksums(chart.Values(chart.nested(path, yaml.safe_load(value))))
    assert set(before) == set(after) == EVERYONE
    assert {name for name in before if before[name] != after[name]} == restarted


def test_the_config_s_checksum_is_on_the_pod() -> None:
    def annotation(values: chart.Values, component: str) -> str:
        return chart.pod_of(chart.rendered(values), component).metadata["annotations"]["checksum/config"]

    for component, path in (("gateway", "config.limits.max_queue"), ("learner", "learner.config.refresh.keep")):
        one, two = (annotation(chart.Values(chart.nested(path, number)), component) for number in (3, 4))
        assert len(one) == 64
        assert one != two


def test_rendering_twice_gives_the_same() -> None:
    for name in ("production", "three-pools", "every-setting"):
        first, second = (chart.run("template", CASES[name]).stdout for _ in range(2))
        assert first == second


def test_what_users_taught_outlives_an_uninstall() -> None:
    kept = {
        item["metadata"]["name"]
        for item in chart.of_kind(chart.rendered(CASES["defaults"]), "PersistentVolumeClaim")
        if item["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {"depo-depo-gateway-checkpoints", "depo-depo-gateway-records"}


def test_a_third_pool_leaves_the_others_alone() -> None:
    more = copy.deepcopy(CASES["three-pools"].set)
    before, after = checksums(CASES["existing-claims"]), checksums(chart.Values(more))
    assert set(after) - set(before) == {"backend mid-size"}
    assert before["backend large"] == after["backend large"]
