"""Cross-fitting: every question is predicted by a model that was not fitted on it, and what they measure is served.

The held-out predictions choose the penalty or the number of epochs, measure the estimator and calibrate it. They tell
about the served model only as far as the models that made them are like it:

- Linear heads on a frozen encoder (linear_fit.py): every fold's model and the served one are solved to convergence, and
  folds are small. Each model is the served one but for the few examples left out.
- Anything else takes SGD epochs (epoch_fit.py), where two models differ by more than their examples. There, the model
  of the first fold itself is served, and only its own held-out predictions measure its shares.

Shapes: N examples, K pools, H heads, O = K * H outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.fitting.epoch_fit import fit_epochs, new_learner
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.foldings import foldings_of, questions_of
from depo_gateway.training.fitting.held_out import HeldOutLogits
from depo_gateway.training.fitting.imputation import impute
from depo_gateway.training.fitting.penalty_search import fit_linear
from depo_gateway.training.fitting.prior_choice import PriorChoice, compare_losses, is_used
from depo_gateway.training.fitting.prior_outcomes import PriorOutcomes
from depo_gateway.training.fitting.prompt_distances import prompt_distances

# Small folds measure the served model; where examples abound, larger ones do as well and take less time
SMALL_FOLDS, LARGE_FOLDS, MANY_EXAMPLES = 20, 10, 2000
EPOCH_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted estimator and what was measured of it."""

    model: Estimator
    trained: tuple[str, ...]  # tensors of the encoder that were trained
    held_out: Sequence[HeldOutLogits]  # by folding
    foldings: Sequence[NDArray[np.int64]]  # (N,) each
    measured: NDArray[np.bool_]  # (N,): whose held-out predictions in the first folding are the served model's
    settings: Mapping[str, Any]  # what the held-out predictions chose
    prior: PriorChoice | None = None  # whether they chose the prior; None: there was none
    distances: Array | None = None  # (N,) held out, from the fitted prompts; None: the model has no centres


def is_convex(model: Estimator, config: LearnerConfig) -> bool:
    """Whether the loss is convex in everything that is fitted: linear heads, a frozen encoder, cross-entropies only."""
    return not (model.config.trunk or config.train_layers or config.ranking_weight or config.gain_weight)


def fit_estimator(
    model: Estimator,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    config: FitConfig,
    prior: PriorOutcomes | None = None,
) -> Fit:
    """Fits an untrained estimator to examples, with the help of a prior where cross-validation finds that it helps.

    Raises ValueError for too few questions, and for a prior of a fit that is not convex.
    """
    convex = is_convex(model, config.learner)
    if prior is not None and not convex:
        raise ValueError(
            "a prior from other models' outcomes needs linear heads on a frozen encoder: fit without a trunk, trained"
            " layers, ranking weight and gain weight"
        )
    learner = new_learner(model, tokenizer, config.learner)
    items = _read_prompts(learner, examples)
    foldings = foldings_of(examples, config.folds or _usual_folds(examples, convex), config.seed)
    if convex:
        fit = fit_heads(learner, items, foldings)
        if prior is None:
            return fit
        other = new_learner(model, tokenizer, config.learner)
        helped = fit_with_prior(fit, other, items, examples, prior, _read_prompts(other, prior.examples))
        return helped if helped.prior is not None and helped.prior.used else replace(fit, prior=helped.prior)
    served, held_out, epochs = fit_epochs(
        lambda: new_learner(model, tokenizer, config.learner), items, foldings, config
    )
    return Fit(served.model, served.trained, held_out, foldings, foldings[0] == 0, {"epochs": epochs})


def _usual_folds(examples: Sequence[Example], convex: bool) -> int:
    usual = EPOCH_FOLDS if not convex else SMALL_FOLDS if len(examples) < MANY_EXAMPLES else LARGE_FOLDS
    return max(2, min(usual, len(set(questions_of(examples)))))


def _read_prompts(learner: Learner, examples: Sequence[Example]) -> list[Item]:
    items: list[Item] = []
    with tqdm(total=len(examples), desc="read prompts", unit="prompt", disable=None) as progress:
        for start in range(0, len(examples), 512):
            items += learner.items(examples[start : start + 512])
            progress.update(len(items) - progress.n)
    return items


def fit_heads(learner: Learner, items: Sequence[Item], foldings: Sequence[NDArray[np.int64]]) -> Fit:
    """The fit of an untrained learner's linear heads."""
    learner.fit_statistics(items)
    learner.settle()
    held_out, penalties = fit_linear(learner.model, items, foldings)
    everything = np.ones(len(items), np.bool_)
    distances = prompt_distances(learner.model, items) if learner.model.config.centres else None
    return Fit(learner.model, (), held_out, foldings, everything, {"penalty": penalties}, None, distances)


def fit_with_prior(
    without: Fit,
    learner: Learner,
    items: Sequence[Item],
    examples: Sequence[Example],
    prior: PriorOutcomes,
    prior_items: Sequence[Item],
) -> Fit:
    """The fit of an untrained learner with the prior, compared with the one without it.

    Raises ValueError for a prior on own questions alone.
    """
    learner.fit_statistics([*items, *prior_items])
    learner.settle()
    imputed = impute(learner.model, items, examples, prior_items, prior, without.foldings)
    if not imputed.items:
        raise ValueError("the prior outcomes have no question besides your own; a prior helps by further questions")
    held_out, penalties = fit_linear(learner.model, items, without.foldings, imputed)
    compared = compare_losses(held_out[0].full, without.held_out[0].full, items)
    known = len(prior.examples) - len(imputed.items)
    choice = PriorChoice(is_used(*compared), len(prior.models), len(imputed.items), known, *compared)
    settings = {"penalty": penalties}
    distances = prompt_distances(learner.model, items, prior_items) if learner.model.config.centres else None
    return replace(
        without, model=learner.model, held_out=held_out, settings=settings, prior=choice, distances=distances
    )
