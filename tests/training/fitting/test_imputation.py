"""Imputed labels: what they are worth where other models are like the own ones, and that no fold sees its questions.

Questions are of ten words each; a word's easiness is random, so 40 labels can't tell it and many other outcomes can.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import LearnerConfig
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.fitting.cross_fit import Fit, fit_estimator
from depo_gateway.training.fitting.epoch_fit import new_learner
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.foldings import foldings_of
from depo_gateway.training.fitting.imputation import Imputed, impute, predict_factors
from depo_gateway.training.fitting.prior_outcomes import PriorOutcomes

LETTERS = "abcdefghijklmnopqrstuvwxyz"
POOLS = ("small", "large")


def text(chance: random.Random) -> str:
    return " ".join(chance.choice(LETTERS) for _ in range(10))


def easiness(texts: Sequence[str], seed: int) -> np.ndarray:
    effect = dict(zip(LETTERS, np.random.default_rng(seed).normal(0, 1, len(LETTERS)), strict=True))
    return np.array([sum(effect[letter] for letter in one.split()) for one in texts])


def own_examples(texts: Sequence[str], seed: int = 0) -> list[Example]:
    """Labels of a small pool that answers easy questions, and of a large one that answers harder ones too."""
    draw = np.random.default_rng(1)
    labels = draw.random((len(texts), 2)) < sigmoid(2 * easiness(texts, seed)[:, None] + np.array([0.0, 4.0]))
    return [Example(one, dict(zip(POOLS, map(float, of), strict=True))) for one, of in zip(texts, labels, strict=True)]


def prior_of(texts: Sequence[str], seed: int = 0, models: int = 12) -> PriorOutcomes:
    draw = np.random.default_rng(2)
    logits = 2 * easiness(texts, seed)[:, None] + np.linspace(-3, 6, models)
    outcomes = (draw.random(logits.shape) < sigmoid(logits)).astype(float)
    return PriorOutcomes(tuple(Example(one, {}) for one in texts), outcomes, tuple(map(str, range(models))), ())


@pytest.fixture(scope="module")
def fit(tiny_encoder: Path) -> Callable[[Sequence[Example], PriorOutcomes | None], Fit]:
    def fitted(examples: Sequence[Example], prior: PriorOutcomes | None) -> Fit:
        model, tokenizer = create_model(ModelConfig(POOLS, TextConfig(max_tokens=16), str(tiny_encoder), 0))
        return fit_estimator(model, tokenizer, examples, FitConfig(folds=5), prior)

    return fitted


def imputed_by(encoder: Path, examples: Sequence[Example], prior: PriorOutcomes) -> tuple[Imputed, list[np.ndarray]]:
    model, tokenizer = create_model(ModelConfig(POOLS, TextConfig(max_tokens=16), str(encoder), 0))
    learner = new_learner(model, tokenizer, LearnerConfig())
    items, prior_items = learner.items(examples), learner.items(prior.examples)
    learner.fit_statistics([*items, *prior_items])
    foldings = foldings_of(examples, 4, 0)
    return impute(learner.model, items, examples, prior_items, prior, foldings), foldings


def test_a_prior_of_like_models_is_used_and_helps_on_held_out_questions(
    fit: Callable[[Sequence[Example], PriorOutcomes | None], Fit],
) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(460)]
    examples = own_examples(texts[:60])
    without, helped = fit(examples, None), fit(examples, prior_of(texts))
    assert helped.prior is not None
    assert helped.prior.used
    assert (helped.prior.further_questions, helped.prior.known_questions) == (400, 60)
    assert helped.prior.loss < helped.prior.loss_without - helped.prior.standard_error
    truth = sigmoid(2 * easiness(texts[:60], 0))
    errors = [((sigmoid(of.held_out[0].full[:, 0, QUALITY]) - truth) ** 2).mean() for of in (helped, without)]
    assert errors[0] < 0.8 * errors[1]


def test_a_prior_on_other_questions_helps_as_well(
    fit: Callable[[Sequence[Example], PriorOutcomes | None], Fit],
) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(460)]
    helped = fit(own_examples(texts[:60]), prior_of(texts[60:]))
    assert helped.prior is not None
    assert helped.prior.used
    assert helped.prior.known_questions == 0
    assert helped.prior.loss < helped.prior.loss_without


def test_a_prior_that_contradicts_own_labels_is_not_used(
    fit: Callable[[Sequence[Example], PriorOutcomes | None], Fit],
) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(700)]
    examples = own_examples(texts[:300])
    without, tried = fit(examples, None), fit(examples, prior_of(texts[300:], seed=5))
    assert tried.prior is not None
    assert not tried.prior.used
    np.testing.assert_array_equal(tried.held_out[0].full, without.held_out[0].full)
    assert tried.settings == without.settings


def test_no_fold_sees_what_the_prior_says_of_its_questions(tiny_encoder: Path) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(120)]
    examples, prior = own_examples(texts[:40]), prior_of(texts)
    before, foldings = imputed_by(tiny_encoder, examples, prior)
    held_out = np.flatnonzero(foldings[0] == 1)
    changed = prior.outcomes.copy()
    changed[held_out] = 1 - changed[held_out]
    after, _ = imputed_by(tiny_encoder, examples, replace(prior, outcomes=changed))
    np.testing.assert_array_equal(after.labels[:, 1], before.labels[:, 1])
    assert (after.labels[:, 0] != before.labels[:, 0]).any()  # for the others they are known questions
    assert len(before.items) == 80


def test_no_fold_sees_the_prior_of_its_question_in_another_conversation(tiny_encoder: Path) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(100)]
    examples, prior = own_examples(texts[:40]), prior_of(texts)
    asked_again = replace(prior, examples=tuple(replace(one, context="before") for one in prior.examples))
    found, foldings = imputed_by(tiny_encoder, examples, asked_again)
    for fold in range(4):
        hidden = found.weights[:40, fold] == 0
        np.testing.assert_array_equal(hidden, foldings[0] == fold)
    assert (found.weights[40:] > 0).all()


def test_no_fold_of_groups_sees_the_prior_of_its_groups(tiny_encoder: Path) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(100)]
    examples = [replace(one, group=f"exam/{n % 4}") for n, one in enumerate(own_examples(texts[:40]))]
    prior = prior_of(texts)
    grouped = replace(prior, examples=tuple(replace(e, group=f"exam/{n % 4}") for n, e in enumerate(prior.examples)))
    found, foldings = imputed_by(tiny_encoder, examples, grouped)
    for fold in range(4):
        group = {examples[n].group for n in np.flatnonzero(foldings[1] == fold)}
        hidden = np.array([one.group in group for one in grouped.examples[40:]])
        np.testing.assert_array_equal(found.weights[:, 4 + fold] == 0, hidden)


def test_imputed_labels_weigh_no_more_than_three_times_the_own_ones(tiny_encoder: Path) -> None:
    chance = random.Random(0)
    texts = [text(chance) for _ in range(240)]
    found, _ = imputed_by(tiny_encoder, own_examples(texts[:40]), prior_of(texts))
    np.testing.assert_allclose(found.weights.sum(0), [90, 90, 90, 90, 120])


def test_factors_are_predicted_from_text() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(400, 5))
    factors = np.column_stack([features @ [1, -1, 0.5, 0, 0] + 3, draw.normal(size=400)])
    found = predict_factors(features[:300], factors[:300], features[300:])
    assert np.corrcoef(found[:, 0], factors[300:, 0])[0, 1] > 0.99
    assert found[:, 1].std() < 0.3  # noise is not predicted
