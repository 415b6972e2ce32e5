"""Every query of every dashboard, and every recording rule, executed: a real Prometheus scrapes real processes."""

import asyncio
import json
import math
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.__main__ import BOARDS, PLACE, main
from gateway.metrics import Metrics
from tests.monitoring import servers, traffic
from tests.monitoring.servers import Prometheus, prometheus
from tests.training import policy
from training.learner_metrics import LearnerMetrics
from training.run_metrics import RunMetrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm/rules"
# What Grafana would put in for its variables. The rate interval is wide, so that the queries see all of the traffic.
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


# --- without servers ---


def test_the_json_is_what_the_code_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out
    assert {path.stem for path in PLACE.glob("*.json")} == set(BOARDS)


def test_a_stale_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("dashboards.__main__.PLACE", tmp_path / "dashboards")
    assert main([]) == 0
    (tmp_path / "dashboards/routing.json").write_text("{}")
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'dashboards/routing.json'} is not what python -m dashboards writes"
    ]


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_whole(name: str) -> None:
    board = json.loads((PLACE / f"{name}.json").read_text())
    assert board["uid"] == f"depo-{name}"
    assert [variable["name"] for variable in board["templating"]["list"]][:2] == ["datasource", "namespace"]
    chosen = r'namespace=~"\$(?:vllm_)?namespace",job=~"\$(?:job|learner|vllm|training)"'
    firing = r'ALERTS\{alertname=~"Depo\.\+",alertstate="firing",'
    known = {f"${variable['name']}" for variable in board["templating"]["list"]}
    shown = [panel for top in board["panels"] for panel in [top, *top.get("panels", ())]]
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        if panel["type"] == "row":
            continue
        assert len(panel["description"]) > 3, panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] in ("state-timeline", "heatmap")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            selectors = re.findall(r"[\w:]+(?:\{|\[)", target["expr"])
            assert selectors
            assert len(re.findall(rf"(?:[\w:]+\{{|{firing}){chosen}", target["expr"])) == len(selectors), target["expr"]
            assert set(re.findall(r"\$(?!__)\w+", target["expr"])) <= known, target["expr"]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    board = json.loads((PLACE / f"{name}.json").read_text())
    for group in [board["panels"], *(row["panels"] for row in board["panels"] if row.get("panels"))]:
        taken: set[tuple[int, int]] = set()
        for panel in group:
            size = panel["gridPos"]
            cells = {(size["x"] + x, size["y"] + y) for x in range(size["w"]) for y in range(size["h"])}
            assert max(x for x, _ in cells) < 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_metric_of_ours_is_on_a_board_and_every_one_named_exists() -> None:
    recorded = {
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    ours: set[str] = set()
    for registry in (Metrics("0").registry, LearnerMetrics("0").registry, RunMetrics("0").registry):
        for metric in registry._collector_to_names:
            ours.add(metric._name + ("_total" if metric._type == "counter" else ""))  # type: ignore[attr-defined]
    named = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for panel in PANELS
        for query, _ in panel.queries
        for name in metrics_in(query)
        if not name.startswith("vllm:")
    }
    assert named - ours - recorded == set()
    read = {name for rule in recorded & named for name in metrics_in(_rules()[rule])}
    shown = named | {re.sub(r"_(bucket|sum|count)$", "", name) for name in read}
    # the builds of learner and run are in their variables; how much was cut is no one's to act on
    assert ours - shown == {"gateway_estimator_truncated_total", "learner_build_info", "training_build_info"}


def _rules() -> dict[str, str]:
    groups = yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_every_alert_named_exists_and_every_one_is_named() -> None:
    groups = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    text = "".join((PLACE / f"{name}.json").read_text() for name in BOARDS)
    named = set(re.findall(r"Alert (\w+): docs/runbooks/\1\.md", text))
    assert named == alerts


# --- with servers ---


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
            time.sleep(3.0)  # scrapes, and the rules after them
            yield Scene(server, stage)


@pytest.mark.slow
@pytest.mark.parametrize("panel", of_gateway_and_learner(), ids=str)
def test_a_panel_shows_something(scene: Scene, panel: Panel) -> None:
    shows(scene.prometheus, panel)


@pytest.mark.slow
@pytest.mark.parametrize("record", _rules())
def test_a_recording_rule_has_a_series(scene: Scene, record: str) -> None:
    samples = scene.prometheus.query(f'{record}{{namespace="depo",job="gateway"}}')
    assert samples
    assert all(math.isfinite(sample["value"]) for sample in samples)


@pytest.mark.slow
def test_the_rules_are_loaded_and_none_fails(scene: Scene) -> None:
    groups = scene.prometheus.get("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= set(_rules())
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("program", ["gateway", "learner"])
def test_promtool_has_nothing_to_say_about_metrics(scene: Scene, program: str) -> None:
    target = {one["labels"]["job"]: one["scrapeUrl"] for one in scene.prometheus.targets()}[program]
    with urllib.request.urlopen(target) as answer:
        page = answer.read()
    told = subprocess.run([servers.program("promtool"), "check", "metrics"], input=page, capture_output=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, b"", b"")


@pytest.mark.slow
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
        "routing: Better than a coin by",
        "routing: Calibration error",
        "learning: Better than a coin by",
        "learning: Published",
        "learning: Calibration error",
        "learning: Length of a training",
    }


# --- a training run ---


RUN = {
    "model_name_or_path": "policy",
    "dataset": "prompts.jsonl",
    "reward": ["telling.py:reward"],
    "output_dir": "out",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 100_000,
    "save_steps": 20,
    "save_total_limit": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "beta": 0.1,
    "depo": "plus",
    "depo_warmup": 1,
    "depo_trunk": False,
    "depo_max_tokens": 64,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[Prometheus]:
    """A Prometheus that watches a real `depo-train rl` of a tiny policy, which has saved a checkpoint."""
    servers.program("prometheus")
    place = tmp_path_factory.mktemp("run")
    policy.save(place / "policy", chat=True)
    policy.prompts().to_json(place / "prompts.jsonl")
    (place / "telling.py").write_text("from tests.training.policy import reward\n")
    address = f"127.0.0.1:{servers.free_port()}"
    settings = {**RUN, "depo_encoder": str(tiny_encoder), "metrics_listen": address}
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    words = ["training", "rl", "--config", "run.yaml"]
    with traffic.Program(words, place / "run.log", quiet) as program:
        program.says(r"metrics on (\S+)")
        with prometheus(place / "prometheus", several(training=address)) as server:
            enough = "training_last_checkpoint_timestamp_seconds > 0 and training_false_reject_ratio >= 0"
            assert server.wait(enough, 120.0), program.said()[-3000:]
            time.sleep(3.0)
            assert program.process.poll() is None, program.said()[-3000:]
            yield server


@pytest.mark.slow
@pytest.mark.parametrize("panel", [panel for panel in PANELS if panel.board == "training-run"], ids=str)
def test_a_panel_shows_the_run(run: Prometheus, panel: Panel) -> None:
    shows(run, panel)
