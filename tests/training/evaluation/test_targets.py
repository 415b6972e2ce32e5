import dataclasses

import numpy as np
import pytest

from depo_gateway.estimator.calibration import Calibration, measure_curve
from depo_gateway.training.evaluation.targets import (
    large_share_at,
    parse_costs,
    parse_target,
    target_summary,
    thresholds_of,
)
from tests.stages import uncalibrated_stage

POOLS = ("small", "large")


def test_the_large_share_of_one_pool_is_the_share_below_the_threshold() -> None:
    assert large_share_at(np.array([[0.2], [0.6], [0.7], [0.9]]), "difficulty", 0.7) == 0.5
    assert large_share_at(np.array([[0.2, 0.9], [0.6, 0.5]]), "gain", 0.9) == 0.5


def test_a_target_that_is_not_met_is_reported() -> None:
    quality = np.tile([[0.9, 0.5], [0.4, 0.8]], (100, 1))  # under gain half the prompts always stay
    observed = np.tile([[0.0, 1.0], [0.0, 1.0]], (100, 1))
    stage = uncalibrated_stage(2)
    curves = {"gain": measure_curve(quality, observed, np.ones(200), "gain")}
    calibrated = Calibration(POOLS, {"full": stage, "cheap": stage}, curves)
    targets = [("large-share", 0.5), ("large-share", 0.7), ("quality", 0.5), ("quality", 0.9)]
    lines = target_summary(
        dataclasses.replace(calibrated, targets=thresholds_of(calibrated, targets, None)), quality, observed, 200
    ).splitlines()
    assert "0.500 [0.431, 0.569]" in lines[2]
    assert lines[-2:] == [
        "large-share=0.7 is not met under gain: the nearest threshold gives 0.500",
        "quality=0.9 is not met under gain: the nearest threshold gives 0.500",
    ]
    assert lines[-3].startswith("|")


def test_targets_and_costs_are_parsed() -> None:
    assert parse_target("large-share=0.3") == ("large-share", 0.3)
    assert parse_costs(["large=5", "small=1"], POOLS) == (1.0, 5.0)
    for target in ("luck=1", "quality", "quality=x", "cost=2", "cost=nan"):
        with pytest.raises(ValueError, match="is none of"):
            parse_target(target)
    with pytest.raises(ValueError, match="each of small, large"):
        parse_costs(["small=1"], POOLS)
