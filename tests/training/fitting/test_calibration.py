"""What calibrate() refits, and what keeps the parent's calibration."""

from dataclasses import replace

import numpy as np
import pytest

from depo_gateway.estimator.calibration import Calibration, Familiarity, Platt
from depo_gateway.training.fitting.calibration import calibrate, unchanged_message

POOLS = ("small", "large")
BEFORE = {
    "quality": (Platt(2.0, 0.1), Platt(3.0, 0.2)),
    "token_confidence": (Platt(4.0, 0.3), Platt(5.0, 0.4)),
}
PARENT = Calibration(POOLS, {"full": BEFORE, "cheap": BEFORE}, {})


def labelled(*missing: tuple[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (200, 2, 2) and labels by head, those of (head, pool) in `missing` left out."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 2, 2))
    quality = (generator.uniform(size=(200, 2)) < 1 / (1 + np.exp(-logits[:, :, 0]))).astype(float)
    token = 1 / (1 + np.exp(-logits[:, :, 1]))
    labels = {"quality": quality, "token_confidence": token}
    for head, pool in missing:
        labels[head][19:, pool] = np.nan
    return logits, labels


def test_all_labels_refit_everything() -> None:
    logits, labels = labelled()
    stage = calibrate(logits, logits, labels, np.ones(200), POOLS, PARENT).stages["cheap"]
    for platt in (*stage["quality"], *stage["token_confidence"]):
        assert platt.slope == pytest.approx(1.0, abs=0.5)
    assert unchanged_message(labels, POOLS, np.ones(200)) == ""


def test_qualities_are_refitted_together_or_not_at_all() -> None:
    logits, labels = labelled(("quality", 1))
    calibrated = calibrate(logits, logits, labels, np.ones(200), POOLS, PARENT)
    for stage in calibrated.stages.values():
        assert stage["quality"] == BEFORE["quality"]
        assert not set(stage["token_confidence"]) & set(BEFORE["token_confidence"])
    message = unchanged_message(labels, POOLS, np.ones(200))
    assert message.startswith("The calibration of quality of small, large is unchanged")


def test_a_pools_token_confidence_is_kept_by_itself() -> None:
    logits, labels = labelled(("token_confidence", 0))
    calibrated = calibrate(logits, logits, labels, np.ones(200), POOLS, PARENT)
    for stage in calibrated.stages.values():
        assert stage["token_confidence"][0] == BEFORE["token_confidence"][0]
        assert stage["token_confidence"][1] != BEFORE["token_confidence"][1]
        assert not set(stage["quality"]) & set(BEFORE["quality"])
    message = unchanged_message(labels, POOLS, np.ones(200))
    assert message.startswith("The calibration of token confidence of small is unchanged")


def test_without_a_parent_what_lacks_labels_is_the_identity() -> None:
    logits, labels = labelled(("token_confidence", 0), ("token_confidence", 1))
    stage = calibrate(logits, logits, labels, np.ones(200), POOLS).stages["full"]
    assert stage["token_confidence"] == (Platt(), Platt())


def test_the_parents_familiarity_is_kept_with_the_means_of_new_labels_where_they_refit_quality() -> None:
    parent = replace(PARENT, familiarity=Familiarity(1.0, 2.0, (0.3, 0.8)))
    logits, labels = labelled()
    weights = np.where(np.arange(200) < 150, 1.0, 0.0)
    found = calibrate(logits, logits, labels, weights, POOLS, parent).familiarity
    assert found is not None
    assert (found.near, found.far) == (1.0, 2.0)
    assert found.means == pytest.approx(labels["quality"][:150].mean(0))
    logits, labels = labelled(("quality", 1))
    assert calibrate(logits, logits, labels, np.ones(200), POOLS, parent).familiarity == parent.familiarity
    assert calibrate(logits, logits, labels, np.ones(200), POOLS, PARENT).familiarity is None
