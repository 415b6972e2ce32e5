"""Where a report's rule, threshold and costs come from."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator.calibration import Calibration, Curve
from depo_gateway.training.evaluation.reported_routing import (
    ReportedRouting,
    add_routing_arguments,
    default_routing,
    read_routing,
    with_target_met,
)

POOLS = ("small", "large")
CONFIG = "version: 1\npools: {small: {model: s, cost: 2, backends: []}, large: {model: l, cost: 8, backends: []}}\n"


def routing(*flags: str) -> ReportedRouting:
    parser = argparse.ArgumentParser()
    add_routing_arguments(parser)
    return read_routing(parser.parse_args(flags), POOLS, default_routing(POOLS))


def config(place: Path, more: str = "", text: str = CONFIG) -> str:
    path = place / "gateway.yaml"
    path.write_text(text + more)
    return str(path)


def test_the_gateways_default_holds_where_nothing_is_said() -> None:
    assert routing() == ReportedRouting("gain", 0.85, "the gateway's default")
    assert default_routing(("policy",)).rule == "difficulty"


def test_a_config_gives_rule_threshold_and_costs_and_flags_win(tmp_path: Path) -> None:
    path = config(tmp_path, "routing: {rule: difficulty, threshold: 0.6}\n")
    assert routing("--config", path) == ReportedRouting("difficulty", 0.6, f"from {path}", (2.0, 8.0))
    found = routing("--config", path, "--threshold", "0.7", "--costs", "small=1", "large=3")
    assert found == ReportedRouting("difficulty", 0.7, "from --threshold", (1.0, 3.0))
    assert routing("--config", config(tmp_path)).threshold == 0.85
    costless = CONFIG.replace(", cost: 2", "").replace(", cost: 8", "")
    assert routing("--config", config(tmp_path, text=costless)).costs is None
    assert routing("--config", config(tmp_path, text=CONFIG.replace(", cost: 2", ""))).costs == (1.0, 8.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CONFIG + "routing: {rule: luck}\n", "routing.rule is 'luck'"),
        (CONFIG + "routing: {threshold: 2}\n", "routing.threshold is 2"),
        (CONFIG + "routing: {threshold: high}\n", "routing.threshold is the text 'high'"),
        (CONFIG + "routing: {target: {share: 0.3}}\n", "routing.target takes one of large_share, quality, cost"),
        (CONFIG + "routing: {target: {large_share: 3}}\n", "routing.target.large_share is 3"),
        (CONFIG.replace("small", "tiny"), "has the pools tiny, large, this report small, large"),
        (CONFIG.replace("cost: 8", "cost: 0"), "the last must be above 0"),
        ("- 1\n", "is not a mapping"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routing("--config", config(tmp_path, text=text))


def test_a_threshold_lies_between_0_and_1() -> None:
    with pytest.raises(ValueError, match=r"--threshold is 1\.5"):
        routing("--threshold", "1.5")


def test_a_target_becomes_the_threshold_that_meets_it_on_these_prompts(tmp_path: Path) -> None:
    small = np.linspace(0.0, 0.9, 1001)
    quality = np.stack([small, np.full(1001, 0.9)], 1)
    curve = Curve((0.0, 0.5, 1.0), ((1.0, 0.0), (0.5, 0.5), (0.2, 0.8)), (0.4, 0.8, 0.9))
    calibrated = Calibration(POOLS, {}, {"gain": curve})
    share = routing("--config", config(tmp_path, "routing: {target: {large_share: 0.3}}\n"))
    found = with_target_met(share, calibrated, quality, np.ones(1001))
    assert (1 - (0.9 - small) < found.threshold).mean() == pytest.approx(0.3, abs=0.01)
    assert found.target is None
    assert "meets routing.target large_share 0.3 on these prompts" in found.source
    cost = routing("--config", config(tmp_path, "routing: {target: {cost: 0.55}}\n"))
    tokens = np.where(small < 0.45, 3.0, 1.0)  # hard prompts are long
    found = with_target_met(cost, calibrated, quality, tokens)
    sent = 1 - (0.9 - small) < found.threshold
    assert 0.25 + 0.75 * tokens[sent].sum() / tokens.sum() == pytest.approx(0.55, abs=0.02)
    kept = routing("--config", config(tmp_path, "routing: {target: {quality: 0.85}}\n"))
    assert with_target_met(kept, calibrated, quality, tokens).threshold == 0.5  # by the checkpoint's own curve
