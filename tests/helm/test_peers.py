"""docs/kubernetes-peers.md: each line that says something of our chart names a test, and that test is there."""

import ast
import re
from pathlib import Path

import pytest

from tests.helm import chart

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kubernetes-peers.md").read_text()
PEERS = ("production-stack", "LiteLLM", "semantic-router", "llm-d")
SAID = re.compile(r"(on|opt|part|no|–)( \[(\d+)\])?")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| |")
]


def functions_of(path: Path) -> set[str]:
    """The names of a file's test functions."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions) and node.name.startswith("test_")}


def test_the_tables_have_a_column_for_each_project_and_one_for_the_tests() -> None:
    heads = re.findall(r"^\| \| (.+) \|$", PAGE, re.MULTILINE)
    assert len(heads) == PAGE.count("\n|---") > 5
    assert set(heads) == {" | ".join(("ours", *PEERS, "our test"))}
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_line_names_the_test_that_shows_it(row: list[str]) -> None:
    _, ours, *theirs, shown = row
    for cell in (ours, *theirs):
        assert SAID.fullmatch(cell), cell
    named = re.findall(r"`([^`]+)`", shown)
    assert bool(named) == (not ours.startswith("no")), "a claim without a test, or a test without a claim"
    for name in named:
        path, function = name.split("::")
        assert function in functions_of(ROOT / "tests" / path), name


def test_every_note_is_there_and_used() -> None:
    used = {int(number) for row in ROWS for cell in row for number in re.findall(r"\[(\d+)\]", cell)}
    notes = PAGE.split("## Notes")[1].split("\n## ")[0]
    assert (
        used
        == {int(number) for number in re.findall(r"^(\d+)\. ", notes, re.MULTILINE)}
        == set(range(1, len(used) + 1))
    )


def test_what_is_on_is_on_with_nothing_set() -> None:
    manifests = chart.rendered(chart.Values())
    pods = list(chart.pods(manifests))
    owners = [
        "Deployment/depo-depo-gateway",
        "Deployment/depo-depo-gateway-large",
        "Deployment/depo-depo-gateway-learner",
    ]
    assert sorted(pod.owner for pod in pods if pod.component != "test") == [
        *owners,
        "Deployment/depo-depo-gateway-small",
    ]
    policies = [item["spec"]["podSelector"] for item in chart.of_kind(manifests, "NetworkPolicy")]
    for pod in pods:
        assert any(chart.selects(policy, pod.labels) for policy in policies), pod.owner
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["automountServiceAccountToken"] is False
    for kind in ("gateway", "backend"):
        assert all(pod.spec["topologySpreadConstraints"] for pod in pods if pod.component == kind)
    boards = [
        item for item in chart.of_kind(manifests, "ConfigMap") if "grafana_dashboard" in item["metadata"]["labels"]
    ]
    assert len(boards) == len(list((chart.CHART / "dashboards").glob("*.json"))) == 5
    kinds = {item["kind"] for item in manifests}
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= kinds
    assert kinds.isdisjoint({"HorizontalPodAutoscaler", "ScaledObject", "Ingress", "HTTPRoute"})  # opt


def test_a_new_gateway_counts_once_it_was_ready_for_a_while() -> None:
    def seconds(**gateway: int) -> int:
        manifests = chart.rendered(chart.Values({"gateway": gateway}))
        found: int = chart.named(manifests, "Deployment", "depo-depo-gateway")["spec"]["minReadySeconds"]
        return found

    assert seconds() > 0
    assert seconds(minReadySeconds=30) == 30
