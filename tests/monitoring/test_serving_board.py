"""What the Serving board's figures count and are counted in."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from dashboards.__main__ import PLACE
from tests.monitoring import servers

CHOSEN = {"$namespace": "depo", "$job": "(a|b)", "$learner": "(a-learner|b-learner)"}


def panel(title: str) -> dict[str, Any]:
    board = json.loads((PLACE / "serving.json").read_text())
    (found,) = [panel for panel in board["panels"] if panel["title"] == title]
    return found  # type: ignore[no-any-return]


def test_alerts_of_gateways_and_of_learners_are_counted(tmp_path: Path) -> None:
    firing = [
        '{alertname="DepoBackendDown",namespace="depo",job="a",backend="one"}',
        '{alertname="DepoBackendDown",namespace="depo",job="a",backend="two"}',
        '{alertname="DepoLearnerStalled",namespace="depo",job="b-learner"}',
    ]
    others = [
        '{alertname="DepoLearnerStalled",namespace="else",job="b-learner"}',
        '{alertname="DepoLearnerStalled",namespace="depo",job="c-learner"}',
        '{alertname="Watchdog",namespace="depo",job="a"}',
    ]
    (target,) = panel("Alerts")["targets"]
    query = target["expr"]
    for name, value in CHOSEN.items():
        query = query.replace(name, value)

    def case(series: list[str], value: int) -> dict[str, Any]:
        shown = [
            {"series": f'ALERTS{item[:-1]},alertstate="{state}"}}', "values": "1"}
            for items, state in ((series, "firing"), (firing, "pending"))
            for item in items
        ]
        checks = [{"expr": query, "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": value}]}]
        return {"interval": "1m", "input_series": shown, "promql_expr_test": checks}

    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump({"tests": [case([*firing, *others], 3), case(others, 0)]}))
    done = subprocess.run([servers.program("promtool"), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tokens_are_counted_a_second() -> None:
    tokens = panel("Tokens")
    assert all("rate(gateway_tokens_total" in target["expr"] for target in tokens["targets"])
    assert tokens["fieldConfig"]["defaults"]["unit"] == "suffix: tokens/s"
