"""What calibrate() refits and what it leaves to the parent."""

import dataclasses

import numpy as np
import pytest

from depo_gateway.estimator.calibration import Calibration, Platt, Stage, measure_curve
from depo_gateway.training.evaluation.targets import (
    large_share,
    parse_costs,
    parse_target,
    summary,
    thresholds_of,
)
from depo_gateway.training.fitting.calibration import calibrate, kept

POOLS = ("small", "large")
BEFORE = Stage((Platt(2.0, 0.1), Platt(3.0, 0.2)), (Platt(4.0, 0.3), Platt(5.0, 0.4)))
PARENT = Calibration(POOLS, {"full": BEFORE, "cheap": BEFORE}, {})


def labelled(*missing: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (200, 2, 2) and labels of quality and token confidence, those of (head, pool) in `missing` left out."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 2, 2))
    quality = (generator.uniform(size=(200, 2)) < 1 / (1 + np.exp(-logits[:, :, 0]))).astype(float)
    token = 1 / (1 + np.exp(-logits[:, :, 1]))
    for head, pool in missing:
        {"quality": quality, "token": token}[head][19:, pool] = np.nan
    return logits, quality, token


def test_all_labels_refit_everything() -> None:
    logits, quality, token = labelled()
    stage = calibrate(logits, logits, quality, token, np.ones(200), POOLS, PARENT).stages["cheap"]
    for platt in (*stage.quality, *stage.token_confidence):
        assert platt.slope == pytest.approx(1.0, abs=0.5)
    assert kept(quality, token, POOLS) == ""


def test_qualities_are_refitted_together_or_not_at_all() -> None:
    logits, quality, token = labelled(("quality", 1))
    calibrated = calibrate(logits, logits, quality, token, np.ones(200), POOLS, PARENT)
    for stage in calibrated.stages.values():
        assert stage.quality == BEFORE.quality
        assert not set(stage.token_confidence) & set(BEFORE.token_confidence)
    assert kept(quality, token, POOLS).startswith("Quality of small, large stays calibrated as it was")


def test_a_pools_token_confidence_is_kept_by_itself() -> None:
    logits, quality, token = labelled(("token", 0))
    calibrated = calibrate(logits, logits, quality, token, np.ones(200), POOLS, PARENT)
    for stage in calibrated.stages.values():
        assert stage.token_confidence[0] == BEFORE.token_confidence[0]
        assert stage.token_confidence[1] != BEFORE.token_confidence[1]
        assert not set(stage.quality) & set(BEFORE.quality)
    assert kept(quality, token, POOLS).startswith("Token confidence of small stays calibrated as it was")


def test_without_a_parent_what_lacks_labels_is_the_identity() -> None:
    logits, quality, token = labelled(("token", 0), ("token", 1))
    stage = calibrate(logits, logits, quality, token, np.ones(200), POOLS).stages["full"]
    assert stage.token_confidence == (Platt(), Platt())


def test_large_share_of_one_pool_is_what_it_is_not_sure_of() -> None:
    assert large_share(np.array([[0.2], [0.6], [0.7], [0.9]]), "difficulty", 0.7) == 0.5
    assert large_share(np.array([[0.2, 0.9], [0.6, 0.5]]), "gain", 0.9) == 0.5


def test_a_target_that_is_missed_is_told() -> None:
    quality = np.tile([[0.9, 0.5], [0.4, 0.8]], (100, 1))  # under gain half the prompts always stay
    observed = np.tile([[0.0, 1.0], [0.0, 1.0]], (100, 1))
    stage = Stage((Platt(), Platt()), (Platt(), Platt()))
    curves = {"gain": measure_curve(quality, observed, np.ones(200), "gain")}
    calibrated = Calibration(POOLS, {"full": stage, "cheap": stage}, curves)
    targets = [("large-share", 0.5), ("large-share", 0.7), ("quality", 0.5), ("quality", 0.9)]
    said = summary(
        dataclasses.replace(calibrated, targets=thresholds_of(calibrated, targets, None)), quality, observed
    ).splitlines()
    assert said[-2:] == [
        "large-share=0.7 is not met under gain: the nearest threshold gives 0.500",
        "quality=0.9 is not met under gain: the nearest threshold gives 0.500",
    ]
    assert said[-3].startswith("|")


def test_what_targets_and_costs_look_like() -> None:
    assert parse_target("large-share=0.3") == ("large-share", 0.3)
    assert parse_costs(["large=5", "small=1"], POOLS) == (1.0, 5.0)
    for target in ("luck=1", "quality", "quality=x", "cost=2", "cost=nan"):
        with pytest.raises(ValueError, match="is none of"):
            parse_target(target)
    with pytest.raises(ValueError, match="each of small, large"):
        parse_costs(["small=1"], POOLS)
