"""The panels of the dashboards in the repository, and what a real Prometheus has to show for one."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from dashboards.__main__ import BOARDS, PLACE
from tests.monitoring.servers import Prometheus

RULES = Path(__file__).parents[2] / "helm/rules"
VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "5m",
    "$vllm_namespace": ".*",
    "$namespace": ".*",
    "$job": "(gateway|gateway-b)",
    "$learner": "(learner|learner-b)",
    "$training": "(training|training-b)",
    "$vllm": "(vllm|vllm-b)",
}


@dataclass(frozen=True)
class Panel:
    board: str
    title: str
    queries: tuple[tuple[str, str], ...]  # PromQL, and how a series of it is called

    def __str__(self) -> str:
        return f"{self.board}: {self.title}"


def panels() -> list[Panel]:
    """Every panel of the boards in the repository, those in closed rows too."""
    found = []
    for name in BOARDS:
        board = json.loads((PLACE / f"{name}.json").read_text())
        for shown in board["panels"]:
            for panel in [shown, *shown.get("panels", ())]:
                if panel["type"] != "row":
                    targets = panel["targets"]
                    queries = tuple((target["expr"], target["legendFormat"]) for target in targets)
                    found.append(Panel(name, panel["title"], queries))
    return found


PANELS = panels()


def of_gateway_and_learner() -> list[Panel]:
    """The panels without what is vLLM's own (tests/vllm/test_vllm_dashboards.py) or a training run's (below)."""
    found = []
    for panel in PANELS:
        ours = tuple(query for query in panel.queries if not re.search(r"\b(vllm:|training_)", query[0]))
        if ours:
            found.append(replace(panel, queries=ours))
    return found


def filled(query: str) -> str:
    """A query as Grafana sends it."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def metrics_in(query: str) -> set[str]:
    """The names of the metrics that a query reads."""
    bare = re.sub(r'"[^"]*"', '""', query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|group_left|ignoring|without) \([^)]*\)", "", bare)
    return set(re.findall(r"\b(?:gateway|learner|training|vllm)[_:][a-z0-9_:]+", bare))


def several(**addresses: str) -> dict[str, list[str]]:
    """Each process as two replicas of one job and as a second job: queries have to do with more than one of a kind."""
    targets = {}
    for job, address in addresses.items():
        targets[job] = [address, address.replace("127.0.0.1", "localhost")]
        targets[f"{job}-b"] = [address]
    return targets


def shows(server: Prometheus, panel: Panel) -> None:
    """Every query has a series with the labels that name it, and the panel a number.

    What a query shows in place of nothing (`zero` in dashboards/panels.py) is no series: the traffic made something.
    """
    numbers: list[float] = []
    for query, legend in panel.queries:
        samples = server.query(filled(query))
        assert samples, query
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            instead = re.findall(rf'label_replace\(vector\(0\), "{label}", "([^"]+)"', query)
            assert {sample["metric"].get(label, "") for sample in samples} - {"", *instead}, (query, label)
        numbers += [sample["value"] for sample in samples]
    assert any(math.isfinite(number) for number in numbers), panel.queries


def recorded() -> dict[str, str]:
    """The recording rules: name -> PromQL."""
    groups = yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}
