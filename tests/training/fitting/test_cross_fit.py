"""What is served is what the held-out predictions measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.fitting.cross_fit import Fit, fit_estimator
from depo_gateway.training.fitting.fit_config import FitConfig
from tests.estimator.test_learner import chatter


def fitted(encoder: Path, examples: list[Example], config: FitConfig, trunk: bool = False) -> tuple[Fit, Learner]:
    torch.manual_seed(0)
    model, tokenizer = create_model(
        ModelConfig(("small", "large"), TextConfig(max_tokens=32), str(encoder), 0, trunk=trunk)
    )
    fit = fit_estimator(model, tokenizer, examples, config)
    return fit, Learner(fit.model, tokenizer, LearnerConfig(average=0.0))


def noisy(count: int, seed: int = 0) -> list[Example]:
    """Prompts whose labels are partly chance."""
    chance = np.random.default_rng(seed)
    examples = []
    for example in chatter(count, seed):
        small = float(chance.random() < (0.3 if example.quality["small"] == 0.0 else 0.8))
        examples.append(Example(example.prompt, {"small": small, "large": 1.0 - 0.2 * small}))
    return examples


def test_held_out_scores_have_the_distribution_of_the_served_models(tiny_encoder: Path) -> None:
    fit, learner = fitted(tiny_encoder, noisy(200), FitConfig())
    assert len(np.unique(fit.foldings[0])) == 20
    assert fit.measured.all()
    fresh, _ = learner.predict(learner.items(noisy(400, seed=1)))
    measured = fit.held_out[0].full
    for k in range(2):
        for share in (0.2, 0.4, 0.6, 0.8):
            at = np.quantile(measured[:, k, 0], share)
            assert abs((fresh[:, k, 0] < at).mean() - share) < 0.12


def test_with_sgd_the_first_folds_model_is_served(tiny_encoder: Path) -> None:
    examples = noisy(60)
    fit, learner = fitted(tiny_encoder, examples, FitConfig(max_epochs=3, batch_size=16), trunk=True)
    np.testing.assert_array_equal(fit.measured, fit.foldings[0] == 0)
    full, _ = learner.predict(learner.items(examples))
    np.testing.assert_allclose(full[fit.measured], fit.held_out[0].full[fit.measured], atol=1e-5)
    assert fit.settings["epochs"] in (1, 2, 3)


def test_the_number_of_folds_follows_the_questions(tiny_encoder: Path) -> None:
    fit, _ = fitted(tiny_encoder, noisy(7), FitConfig())
    assert len(np.unique(fit.foldings[0])) == 7
    with pytest.raises(ValueError, match="fewer --folds"):
        fitted(tiny_encoder, noisy(7), FitConfig(folds=8))
    with pytest.raises(ValueError, match="can't make 2 folds"):
        fitted(tiny_encoder, [noisy(1)[0]] * 3, FitConfig())


def test_equal_fits_are_equal(tiny_encoder: Path) -> None:
    first, _ = fitted(tiny_encoder, noisy(60), FitConfig())
    second, _ = fitted(tiny_encoder, noisy(60), FitConfig())
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
