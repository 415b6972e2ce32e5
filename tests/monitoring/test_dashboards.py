"""Every query of the dashboards, and every recording rule, executed: a real Prometheus scrapes real processes."""

import asyncio
import json
import math
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dashboards.__main__ import BOARDS, PLACE
from tests.monitoring import servers, traffic
from tests.monitoring.panels import Panel, filled, of_gateway_and_learner, recorded, several, shows
from tests.monitoring.servers import Prometheus, prometheus

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Scene:
    prometheus: Prometheus
    stage: traffic.Stage


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Scene]:
    """A Prometheus that has watched all of the traffic."""
    servers.program("prometheus")  # before anything is started
    place = tmp_path_factory.mktemp("scene")
    with traffic.stage(place, tiny_checkpoint) as stage:
        learner = stage.learner.says(r"livez on (\S+)")
        with prometheus(place / "prometheus", several(gateway=stage.admin, learner=learner)) as server:
            assert server.wait("gateway_build_info and on () learner_build_info")  # its first scrape is seconds later
            asyncio.run(traffic.play(stage))
            yield Scene(server, stage)


@pytest.mark.parametrize("panel", of_gateway_and_learner(), ids=str)
def test_a_panel_shows_something(scene: Scene, panel: Panel) -> None:
    shows(scene.prometheus, panel)


@pytest.mark.parametrize("record", recorded())
def test_a_recording_rule_has_a_series(scene: Scene, record: str) -> None:
    samples = scene.prometheus.query(f'{record}{{namespace="depo",job="gateway"}}')
    assert samples
    assert all(math.isfinite(sample["value"]) for sample in samples)


def test_the_rules_are_loaded_and_none_fails(scene: Scene) -> None:
    groups = scene.prometheus.get("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= set(recorded())
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []


def test_annotations_and_variables_are_queries_too(scene: Scene) -> None:
    for name in set(BOARDS) - {"training-run"}:
        board = json.loads((PLACE / f"{name}.json").read_text())
        for annotation in board["annotations"]["list"]:
            scene.prometheus.query(filled(annotation["target"]["expr"]))
        for variable in board["templating"]["list"]:
            asked = variable["query"]
            if variable["type"] != "query" or "vllm" in asked["query"]:
                continue
            series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", asked["query"]).groups()  # type: ignore[union-attr]
            values = scene.prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": filled(series)})["data"]
            kind = "gateway" if variable["name"] == "job" else variable["name"]
            assert values == (["depo"] if label == "namespace" else [kind, f"{kind}-b"])


@pytest.mark.parametrize(
    "happened",
    [
        'gateway_retries_total{reason="status_503"}',
        'gateway_fallbacks_total{from_pool="small",to_pool="large"}',
        *(f'gateway_client_disconnects_total{{phase="{phase}"}}' for phase in ("reading", "queue", "waiting")),
        'gateway_client_disconnects_total{phase="streaming"}',
        *(f'gateway_decisions_total{{reason="{reason}"}}' for reason in ("confident", "unsure", "explore", "pinned")),
        *(f'gateway_decisions_total{{reason="{reason}"}}' for reason in ("fallback", "budget")),
        *(f'gateway_requests_total{{code="{code}"}}' for code in (200, 401, 404, 429, 499, 503)),
        *(f'gateway_config_reloads_total{{result="{result}"}}' for result in ("applied", "refused")),
        *(f'gateway_feedback_total{{outcome="{outcome}"}}' for outcome in ("stored", "unknown")),
        'gateway_estimator_loads_total{result="applied"}',
        'gateway_candidate_outcomes_total{outcome="scored"}',
        'gateway_candidate_agreement_total{agrees="yes"}',
        'gateway_candidate_agreement_total{agrees="no"}',
        'gateway_records_total{outcome="written"}',
        'learner_labels_total{source="exact"}',
        'learner_refreshes_total{verdict="published"}',
        'learner_shadowed_records_total{outcome="done"}',
        'learner_shadowed_records_total{outcome="passed"}',
    ],
)  # fmt: skip
def test_the_traffic_reached(scene: Scene, happened: str) -> None:
    """Else the panels above would show zeros."""
    assert (scene.prometheus.value(f"sum({happened})") or 0) > 0


@pytest.mark.parametrize("program", ["gateway", "learner"])
def test_promtool_has_nothing_to_say_about_metrics(scene: Scene, program: str) -> None:
    target = {one["labels"]["job"]: one["scrapeUrl"] for one in scene.prometheus.targets()}[program]
    with urllib.request.urlopen(target) as answer:
        page = answer.read()
    told = subprocess.run([servers.program("promtool"), "check", "metrics"], input=page, capture_output=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, b"", b"")


def test_where_nothing_goes_wrong_no_panel_is_empty(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """But for those that wait for 200 requests or a first training; a board of blanks hides the one that matters."""
    servers.program("prometheus")
    with traffic.stage(tmp_path, tiny_checkpoint) as stage:
        learner = stage.learner.says(r"livez on (\S+)")
        with prometheus(tmp_path / "prometheus", several(gateway=stage.admin, learner=learner)) as server:
            assert server.wait("gateway_build_info and on () learner_build_info")
            asyncio.run(traffic.calm(stage, 40))  # fewer than a training wants
            time.sleep(3.0)
            empty = {
                str(panel)
                for panel in of_gateway_and_learner()
                for query, _ in panel.queries
                if not any(math.isfinite(sample["value"]) for sample in server.query(filled(query)))
            }
    assert empty == {
        "routing: Score drift",
        "routing: Better than random by",
        "routing: Calibration error",
        "learning: Better than random by",
        "learning: Published",
        "learning: Change at publication",
        "learning: Calibration error",
        "learning: Duration of a training",
    }
