"""The dashboards' JSON is what the code writes, whole, and names metrics and alerts that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.__main__ import BOARDS, PLACE, main
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.rl.metrics import RunMetrics
from tests.monitoring.panels import PANELS, RULES, metrics_in, recorded


def test_the_json_is_what_the_code_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out
    assert {path.stem for path in PLACE.glob("*.json")} == set(BOARDS)


def test_an_outdated_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("dashboards.__main__.PLACE", tmp_path / "dashboards")
    assert main([]) == 0
    (tmp_path / "dashboards/routing.json").write_text("{}")
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'dashboards/routing.json'} is outdated: run python -m dashboards"
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
    rules = recorded()
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
    assert named - ours - set(rules) == set()
    read = {name for rule in set(rules) & named for name in metrics_in(rules[rule])}
    shown = named | {re.sub(r"_(bucket|sum|count)$", "", name) for name in read}
    # the builds of learner and run are in their variables; how much was cut is no one's to act on
    assert ours - shown == {"gateway_estimator_truncated_total", "learner_build_info", "training_build_info"}


def test_every_alert_named_exists_and_every_one_is_named() -> None:
    groups = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    text = "".join((PLACE / f"{name}.json").read_text() for name in BOARDS)
    named = set(re.findall(r"Alert (\w+): docs/runbooks/\1\.md", text))
    assert named == alerts
