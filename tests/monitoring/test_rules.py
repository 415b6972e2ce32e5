"""Alerts, recording rules and runbooks: promtool's own tests, and that the three speak of the same things."""

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from depo_gateway.gateway.metrics import Metrics
from depo_gateway.training.online.metrics import LearnerMetrics
from tests.monitoring import servers

ROOT = Path(__file__).parents[2]
CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
RUNBOOKS = ROOT / "docs/runbooks"
TARGET_LABELS = {"namespace", "job", "instance", "pod", "container"}  # what Prometheus adds to every series
QUERIES = re.compile(r"```promql\n(.*?)```", re.DOTALL)
PACKAGES = ("gateway", "estimator", "training")
OURS = r"\b(?:gateway|learner)_[a-z_]+[a-z]\b"


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "helm/rules" / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yaml")}
RECORDED = {rule["record"]: rule for rule in rules("recording.yaml")}
PAGES = {path.stem: path.read_text() for path in sorted(RUNBOOKS.glob("Depo*.md"))}


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression and where it stands."""
    for name, rule in (RECORDED | ALERTS).items():
        yield name, rule["expr"]
    for name, page in PAGES.items():
        for block in QUERIES.findall(page):
            for line in block.strip().splitlines():
                yield f"runbook {name}", line


def registries() -> list[CollectorRegistry]:
    return [Metrics("0").registry, LearnerMetrics("0").registry]


@functools.cache
def known() -> dict[str, set[str]]:
    """The labels of every series that gateway and learner show, by its name."""
    series: dict[str, set[str]] = {}
    for metric in [metric for registry in registries() for metric in registry._collector_to_names]:
        labels = set(metric._labelnames)  # type: ignore[attr-defined]
        name, kind = metric._name, metric._type  # type: ignore[attr-defined]
        if kind == "histogram":
            series |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
        else:
            series[name + ("_total" if kind == "counter" else "")] = labels
    return series


@functools.cache
def sources() -> str:
    """The code that labels the series: a label's values stand in it."""
    return "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([servers.program("promtool"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_by_file_and_in_the_one_object_that_the_chart_makes(tmp_path: Path) -> None:
    files = sorted((ROOT / "helm/rules").glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"groups": groups}))
    promtool("check", "rules", *files, tmp_path / "all.yaml")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_has_a_case_that_fires_and_one_that_stays_silent() -> None:
    firing, silent = set(), set()
    for group in [group for path in CASES for group in yaml.safe_load(path.read_text())["tests"]]:
        said = re.match(r"(Depo\w+) (fires|stays silent)", group["name"])
        if said is None:
            continue
        if said[2] == "fires":
            assert {case["alertname"] for case in group["alert_rule_test"]} == {said[1]}
            assert any(case.get("exp_alerts") for case in group["alert_rule_test"])
            firing.add(said[1])
        else:
            (case,) = group["promql_expr_test"]
            assert f'alertname="{said[1]}"' in case["expr"]
            assert not case.get("exp_samples")
            silent.add(said[1])
    assert firing == silent == set(ALERTS)


def test_what_must_fire_nothing_has_every_metric_that_an_alert_reads() -> None:
    (quiet,) = [yaml.safe_load(path.read_text()) for path in CASES if path.stem == "quiet"]
    read = {name for rule in ALERTS.values() for name in re.findall(OURS, rule["expr"])}
    for group in quiet["tests"]:
        given = {re.match(r"\w+", one["series"])[0] for one in group["input_series"]}  # type: ignore[index]
        assert read - given == set(), group["name"]


@pytest.mark.parametrize(("where", "query"), list(queries()), ids=[where for where, _ in queries()])
def test_every_series_named_exists_with_its_labels(where: str, query: str) -> None:
    recorded = re.findall(r"gateway:\w+:\w+", query)
    assert set(recorded) <= set(RECORDED), where
    series = known()
    named = re.findall(rf"({OURS})(?:\{{([^}}]*)\}})?", re.sub(r"gateway:\w+:\w+", "", query))
    assert named or recorded or re.search(r"vllm:|container_|\bup\b", query), where
    for name, selector in named:
        assert name in series, name
        assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= series[name] | TARGET_LABELS, name
        for value in "|".join(re.findall(r'\w+[=!]~?"(.*?)"', selector)).split("|"):
            assert not value or re.match(r"\d", value) or f'"{value}"' in sources(), f"{name}: nothing says {value}"
    grouped = {label for labels in re.findall(r"(?:by|on) \(([\w, ]+)\)", query) for label in labels.split(", ")}
    anything = set.union(TARGET_LABELS, *series.values())
    assert grouped <= anything, where


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbooks/{name}.md"
    assert (ROOT / rule["annotations"]["runbook"]).is_file()
    assert "!=" not in re.sub(r"\{[^}]*\}", "", rule["expr"]), "NaN is unequal to everything"


@pytest.mark.parametrize("name", ALERTS)
def test_a_runbook_agrees_with_its_alert(name: str) -> None:
    rule, page = ALERTS[name], PAGES[name]
    title, first = page.split("\n\n")[:2]
    assert title == f"# {name}"
    assert first.startswith(f"Severity `{rule['labels']['severity']}`, ")
    assert (f"for `{rule['for']}`. " if "for" in rule else "at once. ") in first
    thresholds = set(re.findall(r"[<>]=? (\d[\d.]*)", re.sub(r"\{[^}]*\}", "", rule["expr"]))) - {"0"}
    assert thresholds == set(re.findall(r"`([\d.]+)`", first))
    for section in (
        "**What it means.**",
        "**Who notices.**",
        "## Look first",
        "## Causes and what to do",
        "## Silence",
    ):
        assert section in page, section
    assert len(page.splitlines()) < 50, "a page"
    silenced = re.findall(r"alertname=(\w+)", page)
    assert set(silenced) <= {name}


def test_runbooks_are_the_alerts_and_the_index_lists_them() -> None:
    assert set(PAGES) == set(ALERTS)
    rows = re.findall(
        r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \| ?(\w*) \|", (RUNBOOKS / "README.md").read_text(), re.MULTILINE
    )
    expected = [(name, rule["labels"]["severity"], rule.get("for", "")) for name, rule in ALERTS.items()]
    assert sorted(rows) == sorted(expected)


def test_links_between_runbooks_lead_somewhere() -> None:
    for path in RUNBOOKS.glob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_runbooks_queries_are_promql(tmp_path: Path) -> None:
    found = [query for where, query in queries() if where.startswith("runbook")]
    assert len(found) > len(ALERTS)
    group = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(found)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": group}]}))
    promtool("check", "rules", tmp_path / "rules.yaml")


@pytest.mark.parametrize("name", [name for name, rule in ALERTS.items() if "for" not in rule])
def test_a_counter_whose_first_step_alerts_is_there_before_it(name: str) -> None:
    """Prometheus sees no increase in a series that begins with 1."""
    ((metric, selector),) = re.findall(r"increase\((\w+)\{(\w+=~?\"[\w|]+\")\}", ALERTS[name]["expr"])
    label, values = re.match(r"(\w+)=~?\"([\w|]+)\"", selector).groups()  # type: ignore[union-attr]
    for value in values.split("|"):
        assert 0.0 in [registry.get_sample_value(metric, {label: value}) for registry in registries()], value
