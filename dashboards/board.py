"""The frame of a board: its variables, its links to the others, its annotations, and the position of each panel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.panels import SOURCE, Panel

COLUMNS = 24
TAG = "depo"


@dataclass(frozen=True, slots=True)
class Jobs:
    """A variable that selects among the Prometheus jobs of one kind of process."""

    name: str
    label: str
    metric: str  # every process of the kind has it
    namespace: str = "namespace"  # the variable that selects among namespaces

    @property
    def these(self) -> str:
        """The matchers of a query for the selected jobs."""
        return f'namespace=~"${self.namespace}",job=~"${self.name}"'


# Their names differ because links between boards carry the values of variables over.
GATEWAY = Jobs("job", "Gateway", "gateway_build_info")
LEARNER = Jobs("learner", "Learner", "learner_build_info")
VLLM = Jobs("vllm", "vLLM", "vllm:num_requests_running", "vllm_namespace")  # may be in another namespace
TRAINING = Jobs("training", "Training run", "training_build_info")


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a title. A closed row is for an optional feature."""

    title: str
    panels: Sequence[Panel]
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """An annotation on every graph: each series of a query, while it exists."""

    name: str
    expr: str
    title: str
    colour: str


def alerts() -> Event:
    """The firing alerts."""
    expr = 'ALERTS{alertname=~"Depo.+",alertstate="firing",namespace=~"$namespace"}'
    return Event("Alerts", expr, "{{alertname}}", "red")


def new_version(jobs: Jobs, metric: str, title: str) -> Event:
    """The times at which a version appears that did not exist a minute before."""
    now = f"count by (version) ({metric}{{{jobs.these}}})"
    before = f"count by (version) ({metric}{{{jobs.these}}} offset 1m)"
    return Event(title, f"{now} unless {before}", "{{version}}", "blue")


def board(
    name: str, title: str, about: str, jobs: Sequence[Jobs], events: Sequence[Event], rows: Sequence[Row]
) -> dict[str, Any]:
    """A dashboard, as Grafana's JSON, about processes of the kinds `jobs`."""
    variables: dict[str, dict[str, Any]] = {}
    for each in jobs:
        variables.setdefault(each.namespace, _namespaces(each))
        variables[each.name] = _jobs(each)
    return {
        "uid": f"depo-{name}",
        "title": f"DEPO Gateway / {title}",
        "description": about,
        "tags": [TAG],
        "editable": False,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "links": [_links()],
        "templating": {"list": [_datasource(), *variables.values()]},
        "annotations": {"list": [_annotation(event) for event in events]},
        "panels": _placed(rows),
    }


def _placed(rows: Sequence[Row]) -> list[Panel]:
    """Places panels from left to right under each row's title; a closed row contains its panels."""
    shown: list[Panel] = []
    y, number = 0, 0
    for row in rows:
        number += 1
        head: Panel = {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": row.closed,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        shown.append(head)
        y += 1
        x, tallest = 0, 0
        for panel in row.panels:
            number += 1
            size = panel["gridPos"]
            if x + size["w"] > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            placed = {"id": number, **panel, "gridPos": {**size, "x": x, "y": y}}
            (head["panels"] if row.closed else shown).append(placed)
            x, tallest = x + size["w"], max(tallest, size["h"])
        y += 0 if row.closed else tallest
    return shown


def _datasource() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"}


def _namespaces(jobs: Jobs) -> dict[str, Any]:
    # `.*` instead of the values: outside Kubernetes no series has the label.
    label = "Namespace" if jobs.namespace == "namespace" else f"{jobs.label} namespace"
    return {**_query(jobs.namespace, label, f"label_values({jobs.metric}, namespace)"), "allValue": ".*"}


def _jobs(jobs: Jobs) -> dict[str, Any]:
    return _query(jobs.name, jobs.label, f'label_values({jobs.metric}{{namespace=~"${jobs.namespace}"}}, job)')


def _query(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _links() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "DEPO Gateway",
        "tags": [TAG],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }


def _annotation(event: Event) -> dict[str, Any]:
    return {
        "name": event.name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": event.colour,
        "titleFormat": event.title,
        "target": {"refId": "Anno", "expr": event.expr, "interval": "", "legendFormat": event.title},
    }
