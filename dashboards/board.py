"""A board's frame: its variables, its links to the others, its annotations, and where each panel goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.panels import SOURCE, Panel

COLUMNS = 24
TAG = "depo"


@dataclass(frozen=True, slots=True)
class Jobs:
    """A variable that chooses among the jobs which Prometheus scrapes a kind of process as."""

    name: str
    label: str
    metric: str  # every process of the kind has it
    namespace: str = "namespace"  # the variable that chooses among namespaces

    @property
    def these(self) -> str:
        """The matchers of a query about the chosen ones."""
        return f'namespace=~"${self.namespace}",job=~"${self.name}"'


# Named apart, because links between boards take the variables' values along.
GATEWAY = Jobs("job", "Gateway", "gateway_build_info")
LEARNER = Jobs("learner", "Learner", "learner_build_info")
VLLM = Jobs("vllm", "vLLM", "vllm:num_requests_running", "vllm_namespace")  # may be at home elsewhere
TRAINING = Jobs("training", "Training run", "training_build_info")


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a title. A closed one is of a feature that not everybody uses."""

    title: str
    panels: Sequence[Panel]
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """What is marked on every graph: each series that a query has, when it has it."""

    name: str
    expr: str
    title: str
    colour: str


def alerts() -> Event:
    """The alerts that fire."""
    expr = 'ALERTS{alertname=~"Depo.+",alertstate="firing",namespace=~"$namespace"}'
    return Event("Alerts", expr, "{{alertname}}", "red")


def new_version(jobs: Jobs, metric: str, title: str) -> Event:
    """The moments at which a version appears that was not there a minute before."""
    now = f"count by (version) ({metric}{{{jobs.these}}})"
    before = f"count by (version) ({metric}{{{jobs.these}}} offset 1m)"
    return Event(title, f"{now} unless {before}", "{{version}}", "blue")


def board(
    name: str, title: str, about: str, jobs: Sequence[Jobs], events: Sequence[Event], rows: Sequence[Row]
) -> dict[str, Any]:
    """A whole dashboard, as Grafana's JSON, about processes of the kinds `jobs`."""
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
    """Panels from left to right, each row's under its title; a closed row holds its own."""
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
    # `.*` rather than the values: outside Kubernetes nothing has the label.
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
