"""The joint calibration: its fit, and its folding into weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.online import joint_calibration
from depo_gateway.training.online.joint_calibration import LogitTransform


def logits(count: int, pools: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, pools, 2))


@pytest.mark.parametrize("pools", [2, 3])
def test_it_finds_how_labels_were_drawn(pools: int) -> None:
    z = logits(20_000, pools)
    true = LogitTransform(1.3, 0.4, tuple(0.3 * k - 0.2 for k in range(pools)))
    drawn = np.random.default_rng(1).uniform(size=(len(z), pools))
    observed = (drawn < sigmoid(true.apply(z)[:, :, 0])).astype(float)
    observed[::3, 0] = np.nan
    found = joint_calibration.fit_logit_transform(z, observed, np.ones(len(z)))
    assert found.common == pytest.approx(1.3, abs=0.1)
    assert found.difference == pytest.approx(0.4, abs=0.1)
    assert found.offsets == pytest.approx(true.offsets, abs=0.1)
    mixed = true.apply(z)
    assert mixed[:, :, 0].mean(1) == pytest.approx(1.3 * z[:, :, 0].mean(1) + np.mean(true.offsets))
    assert mixed[:, :, 1] == pytest.approx(z[:, :, 1])


def test_weights_count_and_too_few_labels_change_nothing() -> None:
    z = logits(400)
    observed = (z[:, :, 0] > 0).astype(float)
    weights = np.ones(400)
    weights[200:] = 0.0
    observed[200:] = 1 - observed[200:]
    assert (
        joint_calibration.fit_logit_transform(z, observed, weights).difference > 1
    )  # the half that counts is separable
    observed[15:, 1] = np.nan
    assert joint_calibration.fit_logit_transform(z, observed, np.ones(400)) == joint_calibration.identity_transform(2)


def test_the_order_of_pools_is_never_reversed() -> None:
    z = logits(2000)
    found = joint_calibration.fit_logit_transform(z, (z[:, :, 0] < 0).astype(float), np.ones(2000))
    assert min(found.common, found.difference) == joint_calibration.LEAST_SLOPE


@pytest.mark.parametrize(("wide", "trunk"), [(True, False), (True, True), (False, True), (False, False)])
def test_folded_weights_give_transformed_logits(tiny_encoder: Path, wide: bool, trunk: bool) -> None:
    config = ModelConfig(("small", "large"), TextConfig(), str(tiny_encoder), 0, wide, trunk)
    estimator, tokenizer = create_model(config)
    generator = torch.Generator().manual_seed(0)
    learner = Learner(estimator, tokenizer, LearnerConfig(average=0.0))
    with torch.no_grad():
        for parameter in learner.heads:
            parameter.normal_(generator=generator)
    items = learner.items([Example(text, {}) for text in ("an easy one", "a hard question", "what is two")])
    before = learner.predict(items)
    transform = LogitTransform(1.2, 0.5, (0.1, -0.3))
    joint_calibration.fold_into_weights(estimator, transform)
    for stage, was in zip(learner.predict(items), before, strict=True):
        assert stage == pytest.approx(transform.apply(was), abs=1e-4, rel=1e-4)
    assert np.abs(before[0]).max() > 0.5


def test_few_uninformative_labels_leave_the_order() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 0.3, (120, 2, 2))
    transform = joint_calibration.fit_logit_transform(
        logits, (generator.random((120, 2)) < 0.6).astype(float), np.ones(120)
    )
    assert abs(transform.difference - joint_calibration.DIFFERENCE) < 0.3
