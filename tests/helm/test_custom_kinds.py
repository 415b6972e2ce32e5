"""Objects of the kinds that operators define are as their CRDs want them.

The classes of @kubernetes-models, made from the CRDs, say whether each field's value is right, and TypeScript whether
there is such a field at all. Where npm isn't installed these tests are skipped; with DEPO_NEEDS_NODE=1 they fail.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import node
from tests.helm import chart
from tests.helm.cases import CASES, MANY
from tests.helm.chart import CHART, Manifest, Values, merged

CRDS = Path(__file__).parent / "crds"
PACKAGES = {
    "gateway.networking.k8s.io/v1": "gateway-api",
    "keda.sh/v1alpha1": "keda",
    "monitoring.coreos.com/v1": "prometheus-operator",
}
Check = Callable[[list[Manifest]], list[str]]


def custom(manifests: list[Manifest]) -> list[Manifest]:
    return [item for item in manifests if item["apiVersion"] in PACKAGES]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Says what is wrong with objects, a line each."""
    place = tmp_path_factory.mktemp("crds")
    node.furnish(place, CRDS, ("package.json", "tsconfig.json", "validate.js"))

    def said(objects: list[Manifest]) -> list[str]:
        command = ["node", "--preserve-symlinks", "--preserve-symlinks-main", "validate.js"]
        done = subprocess.run(command, cwd=place, input=json.dumps(objects), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        values = [f"{chart.name_of(objects[n])}: {text}" for n, text in enumerate(json.loads(done.stdout)) if text]
        lines = []
        for number, item in enumerate(objects):
            module = f"@kubernetes-models/{PACKAGES[item['apiVersion']]}/{item['apiVersion']}"
            lines.append(f"import type {{ I{item['kind']} as I{number} }} from '{module}';")
            lines.append(f"export const item{number}: I{number} = {json.dumps(item)};")
        (place / "objects.ts").write_text("\n".join(lines))
        command = ["node", "node_modules/typescript/bin/tsc", "--project", "."]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(done.stdout), done.stderr
        fields = [
            f"{chart.name_of(objects[(int(found[1]) - 1) // 2])}: {found[2]}"
            for found in re.finditer(r"^objects\.ts\((\d+),\d+\): (.*)", done.stdout, re.MULTILINE)
        ]
        assert len(fields) > 0 or not done.stdout, done.stdout
        return values + fields

    return said


@pytest.mark.slow
def test_operators_take_every_object(check: Check) -> None:
    seen: dict[str, Manifest] = {}
    for values in CASES.values():
        for item in custom(chart.rendered(values)):
            seen.setdefault(json.dumps(item, sort_keys=True), item)
    objects = list(seen.values())
    assert {item["kind"] for item in objects} == {
        *("ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute")
    }
    assert check(objects) == []


@pytest.mark.slow
def test_they_refuse_what_is_wrong(check: Check) -> None:
    values = Values(merged(MANY, {"gateway": {"keda": {"enabled": True}}, **CASES["http-route"].set}))
    objects = {item["kind"]: item for item in custom(chart.rendered(values))}
    objects["ServiceMonitor"]["spec"]["endpoints"][0]["intervall"] = "15s"
    objects["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["interval"] = "15 seconds"
    objects["ScaledObject"]["spec"]["minReplicaCount"] = "3"
    objects["HTTPRoute"]["spec"]["rules"][0]["timeouts"]["request"] = "10 minutes"
    objects["PrometheusRule"]["spec"]["groups"][0]["rules"][0]["for"] = 5
    said = "\n".join(check(list(objects.values())))
    for kind, word in (
        ("ServiceMonitor", "intervall"),
        ("PodMonitor", "interval"),
        ("ScaledObject", "minReplicaCount"),
        ("HTTPRoute", "request"),
        ("PrometheusRule", "for"),
    ):
        assert re.search(rf"^{kind}/.*{word}", said, re.MULTILINE), said


def test_rules_are_those_of_the_files() -> None:
    """As promtool tests them: nothing in them may be read as a template."""
    (found,) = chart.of_kind(chart.rendered(CASES["defaults"]), "PrometheusRule")
    groups: list[Any] = []
    for name in ("recording", "alerts"):
        groups += yaml.safe_load((CHART / f"rules/{name}.yaml").read_text())["groups"]
    assert found["spec"]["groups"] == groups


def test_rules_can_be_left_out_and_lead_to_their_runbooks() -> None:
    for ending in ("", "/", "//", "/docs/runbooks", "/docs/runbooks/"):
        base = {"monitoring": {"rules": {"runbookBaseUrl": f"https://runbooks.example.com/depo{ending}"}}}
        (found,) = chart.of_kind(chart.rendered(CASES["forced-monitoring"].over(base)), "PrometheusRule")
        alerts = [rule for group in found["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
        assert alerts
        for rule in alerts:
            address = f"https://runbooks.example.com/depo/docs/runbooks/{rule['alert']}.md"
            assert rule["annotations"]["runbook_url"] == address
    named = alerts[0]["alert"]
    (fewer,) = chart.of_kind(
        chart.rendered(CASES["defaults"].over({"monitoring": {"rules": {"disabled": [named]}}})), "PrometheusRule"
    )
    assert {rule.get("alert") for group in fewer["spec"]["groups"] for rule in group["rules"]} == {
        rule.get("alert") for group in found["spec"]["groups"] for rule in group["rules"]
    } - {named}


def test_dashboards_are_those_of_the_files() -> None:
    maps = [
        item
        for item in chart.of_kind(chart.rendered(CASES["defaults"]), "ConfigMap")
        if item["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    found = [json.loads(text) for item in maps for text in item["data"].values()]
    files = [json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")]
    assert len(files) == 5
    assert sorted(found, key=str) == sorted(files, key=str)
    assert all(item["metadata"]["annotations"]["grafana_folder"] == "DEPO" for item in maps)
