"""evaluate and calibrate on what `depo-train rl` leaves behind: one pool, a chat template, no cheap stage."""

import json
from pathlib import Path

import pytest

from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from depo_gateway.training.evaluation.predictions import served_text


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {"question": f"{kind} number {n}", "correct": {"policy": float(kind == "easy")}}
        for n in range(20)
        for kind in ("easy", "hard")
    ]
    place = tmp_path / "outcomes.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_it_is_read_as_the_gateway_would_read_it(tiny_policy_checkpoint: Path) -> None:
    config = Runtime.load(tiny_policy_checkpoint).manifest.text
    prompt, context = served_text(config, "hard sum", "easy sum")
    assert prompt != "hard sum"
    assert "easy sum\nhard sum" in prompt
    assert context == ""


def test_it_can_be_evaluated(tiny_policy_checkpoint: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert (
        main(["evaluate", "--checkpoint", str(tiny_policy_checkpoint), "--outcomes", str(table), "--out", str(out)])
        == 0
    )
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 40
    assert set(scores[0]["confidence"]) == {"policy"}


def test_it_can_be_calibrated_for_a_share(tiny_policy_checkpoint: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibrated"
    command = ["calibrate", "--checkpoint", str(tiny_policy_checkpoint), "--outcomes", str(table), "--out", str(out)]
    assert main([*command, "--target", "large-share=0.5"]) == 0
    calibrated = Runtime.load(out)
    assert not calibrated.has_cheap
    assert "large-share=0.5" in calibrated.calibration.targets
