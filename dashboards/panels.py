"""The kinds of panels, as Grafana's JSON. A panel's description says what it shows and when to act.

Widths are of 24 columns. A query's `{{label}}` names its series.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Panel = dict[str, Any]
Query = tuple[str, str]  # PromQL, the name of its series
Steps = Sequence[tuple[float | None, str]]  # (from here on, colour); the first from None

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
GOOD, WARN, BAD, PLAIN = "green", "orange", "red", "text"
NOT_A_NUMBER = {"type": "special", "options": {"match": "nan", "result": {"text": "n/a", "index": 0}}}
BY_NAME = {"mode": "palette-classic-by-name"}  # a pool has one colour on every panel


def above(warn: float | None, bad: float | None = None) -> Steps:
    """Green below, orange from `warn` on, red from `bad` on."""
    steps: list[tuple[float | None, str]] = [(None, GOOD)]
    steps += [(limit, colour) for limit, colour in ((warn, WARN), (bad, BAD)) if limit is not None]
    return steps


def below(warn: float, bad: float) -> Steps:
    """Green from `warn` on, orange from `bad` on, red below."""
    return [(None, BAD), (bad, WARN), (warn, GOOD)]


def zero(expr: str, label: str = "", value: str = "none") -> str:
    """A query that shows 0 instead of an empty panel while there are no events.

    Args:
        label: that distinguishes the series; the zero series has the value `value`.
    """
    none = f'label_replace(vector(0), "{label}", "{value}", "", "")' if label else "vector(0)"
    return f"({expr}) or on () {none}"


def stat(
    title: str,
    about: str,
    queries: Query | Sequence[Query],
    unit: str = "short",
    *,
    steps: Steps = ((None, PLAIN),),
    texts: Mapping[float, tuple[str, str]] | None = None,
    decimals: int | None = None,
    names: bool = False,
    graph: bool = False,
    width: int = 4,
    alerts: Sequence[str] = (),
    no_value: str = "no data",
) -> Panel:
    """Current values.

    Args:
        texts: the text and colour to show for a value.
        names: show the names of the series instead of their values.
        graph: show the selected time range behind the value.
    """
    defaults: dict[str, Any] = {
        "unit": unit,
        "noValue": no_value,
        "color": {"mode": "thresholds"},
        "thresholds": _thresholds(steps),
        "mappings": [NOT_A_NUMBER, *_mappings(texts)],
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "value",
        "graphMode": "area" if graph else "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "showPercentChange": False,
        "textMode": "name" if names else "auto",
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return _panel("stat", title, about, queries, defaults, options, width, 4, alerts, instant=not graph)


def lines(
    title: str,
    about: str,
    queries: Query | Sequence[Query],
    unit: str = "short",
    *,
    limit: float | None = None,
    stacked: bool = False,
    bars: bool = False,
    at_most: float | None = None,
    at_least: float | None = 0,
    width: int = 8,
    height: int = 8,
    alerts: Sequence[str] = (),
) -> Panel:
    """Values over time.

    Args:
        limit: drawn as a dashed red line: an alert's, or one to watch.
        at_most: the maximum of the axis; `at_least`: its minimum.
    """
    custom: dict[str, Any] = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 1,
        "fillOpacity": 60 if bars else 30 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if limit is None else "dashed"},
    }
    defaults: dict[str, Any] = {
        "unit": unit,
        "color": BY_NAME,
        "custom": custom,
        "thresholds": _thresholds([(None, "transparent"), (limit, BAD)] if limit is not None else [(None, PLAIN)]),
    }
    if at_least is not None:
        defaults["min"] = at_least
    if at_most is not None:
        defaults["max"] = at_most
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, about, queries, defaults, options, width, height, alerts)


def states(
    title: str,
    about: str,
    queries: Query | Sequence[Query],
    texts: Mapping[float, tuple[str, str]],
    *,
    width: int = 12,
    height: int = 8,
    alerts: Sequence[str] = (),
) -> Panel:
    """A band for each series, coloured by its state."""
    defaults = {
        "color": {"mode": "thresholds"},
        "thresholds": _thresholds([(None, PLAIN)]),
        "mappings": _mappings(texts),
        "custom": {"fillOpacity": 70, "lineWidth": 0},
    }
    options = {
        "alignValue": "left",
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "auto",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return _panel("state-timeline", title, about, queries, defaults, options, width, height, alerts)


def spectrum(
    title: str, about: str, expr: str, unit: str = "short", *, width: int = 12, alerts: Sequence[str] = ()
) -> Panel:
    """A histogram's buckets over time; `expr` is their rates by `le`."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Blues",
            "scale": "exponential",
            "exponent": 0.5,
            "steps": 64,
            "reverse": False,
            "fill": "dark-blue",
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit, "decimals": 2},
    }
    defaults = {"custom": {"hideFrom": {"legend": False, "tooltip": False, "viz": False}}}
    return _panel(
        "heatmap", title, about, (expr, "{{le}}"), defaults, options, width, 8, alerts, query_format="heatmap"
    )


def buckets(title: str, about: str, expr: str, unit: str = "short", *, width: int = 12) -> Panel:
    """A histogram over the selected time range, a bar per bucket; `expr` is their increases by `le`."""
    defaults = {"unit": unit, "decimals": 0, "min": 0, "color": {"mode": "continuous-blues"}}
    options = {
        "displayMode": "gradient",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "maxVizHeight": 300,
        "minVizHeight": 16,
        "minVizWidth": 8,
        "namePlacement": "auto",
        "orientation": "vertical",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": False,
        "sizing": "auto",
        "valueMode": "hidden",
    }
    query = (expr, "{{le}}")
    return _panel(
        "bargauge", title, about, query, defaults, options, width, 8, (), instant=True, query_format="heatmap"
    )


def _panel(
    kind: str,
    title: str,
    about: str,
    queries: Query | Sequence[Query],
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    width: int,
    height: int,
    alerts: Sequence[str],
    instant: bool = False,
    query_format: str = "time_series",
) -> Panel:
    given = [queries] if isinstance(queries[0], str) else list(queries)
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + number),
            "editorMode": "code",
            "expr": expr,
            "legendFormat": legend,
            "format": query_format,
            "instant": instant,
            "range": not instant,
        }
        for number, (expr, legend) in enumerate(given)
    ]
    runbooks = "".join(f"\n\nAlert {name}: docs/runbooks/{name}.md" for name in alerts)
    return {
        "type": kind,
        "title": title,
        "description": about + runbooks,
        "datasource": SOURCE,
        "gridPos": {"h": height, "w": width, "x": 0, "y": 0},
        "targets": targets,
        "fieldConfig": {"defaults": dict(defaults), "overrides": []},
        "options": dict(options),
    }


def _thresholds(steps: Steps) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}


def _mappings(texts: Mapping[float, tuple[str, str]] | None) -> list[dict[str, Any]]:
    if not texts:
        return []
    shown = {
        f"{value:g}": {"text": text, "color": colour, "index": index}
        for index, (value, (text, colour)) in enumerate(texts.items(), 1)
    }
    return [{"type": "value", "options": shown}]
