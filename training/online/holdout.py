"""Stages calibrate and judge of a refresh: the candidate, and the verdict on its held-out predictions.

A checkpoint predicts the examples that it was fitted on better than others. So calibration and comparison use examples
that are new to both sides.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, calibrate_quality, measure_curve
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.contamination import certainly_unseen
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.familiarity import familiarity_of
from depo_gateway.training.fitting.held_out import HeldOutLogits
from depo_gateway.training.fitting.prompt_distances import prompt_distances
from depo_gateway.training.online.champion import StartingPoint, new_to, served_quality
from depo_gateway.training.online.cross_fit import cross_calibrated_quality, fit_on_everything, learner_config
from depo_gateway.training.online.joint_calibration import LogitTransform, fit_logit_transform, fold_into_weights
from depo_gateway.training.online.publish_gate import Holdout, assess, log_loss
from depo_gateway.training.online.refresh_data import Candidate, ChampionPredictions, RefreshData
from depo_gateway.training.online.training_set import items_of
from depo_gateway.training.outcomes.table import Pools, examples_of, question_key

WIDE_HOLDOUT = 1500  # examples: without covariate shift, a calibration on fewer is less exact


def calibrate_candidate(data: RefreshData) -> RefreshData:
    """The model fitted on all examples, calibrated on the newest held-out predictions.

    Two calibrations are tried, on few newest examples and on more; the better one on the former is taken.
    """
    assert data.fit is not None
    config, count = data.inputs.config, len(data.traffic.examples)
    share = round(config.held_out * count)
    newest = _last(count, max(config.held_out_least, share)) & data.new
    recent = _last(count, max(config.recent, share)) & data.new
    wide = _last(count, max(WIDE_HOLDOUT, share)) & data.new
    calibrations = [calibrate_on(rows, data) for rows in (recent, wide)]
    losses = [float(np.nanmean(log_loss(quality, data.observed)[recent])) for *_, quality in calibrations]
    better = int(losses[1] < losses[0])
    calibration, transform, quality = calibrations[better]
    learner = fit_on_everything(data.fit, data.items, config)
    fold_into_weights(learner.model, transform)
    if learner.model.config.centres and (data.fit.initialisation.fresh or calibration.familiarity is None):
        distances = prompt_distances(learner.model, data.items)
        familiarity = familiarity_of(distances, data.observed, data.weights)
        calibration = dataclasses.replace(calibration, familiarity=familiarity)
    candidate = Candidate(learner, calibration, quality, (recent, wide)[better], newest)
    return dataclasses.replace(data, candidate=candidate)


def calibrate_on(rows: NDArray[np.bool_], data: RefreshData) -> tuple[Calibration, LogitTransform, Array]:
    """(the calibration of the held-out predictions of `rows` (N,), for weights that hold the transform; the transform;
    the candidate's qualities (N, K), those of `rows` by a calibration that left out their fold).
    """
    assert data.fit is not None
    start, raw = data.inputs.start, data.fit.logits
    observed, weights = data.observed[rows], data.weights[rows]
    transform = fit_logit_transform(raw.full[rows], observed, weights)
    logits = HeldOutLogits(transform.apply(raw.full), transform.apply(raw.cheap))
    checkpoints = (start.champion, start.base)
    name = data.fit.initialisation.name
    before = next((known.calibration for known in checkpoints if known and known.name == name), None)
    heads = data.fit.initialisation.model.config.heads
    labels = {h: of[rows] for h, of in labels_by_head(data.traffic.examples, start.pools, heads).items()}
    calibration = calibrate(logits.full[rows], logits.cheap[rows], labels, weights, start.pools, before)
    quality = calibrate_quality(calibration.stages["full"], logits.full)
    # Quality targets need a curve: where no prompt has labels of all pools, predictions take the missing labels' place
    imputed = np.where(np.isnan(observed), quality[rows], observed)
    curves = {
        rule: measure_curve(quality[rows], imputed, weights, rule) if measured.quality is None else measured
        for rule, measured in calibration.curves.items()
    }
    calibration = dataclasses.replace(calibration, curves=curves)
    quality[rows] = cross_calibrated_quality(raw.full[rows], observed, weights, data.folds[rows])
    return calibration, transform, quality


def judge_candidate(data: RefreshData) -> RefreshData:
    """The publish gate's verdict on the candidate, against the champion."""
    assert data.fit is not None
    config, champion = data.inputs.config, champion_predictions(data)
    reference = reference_holdout(data)
    notes = data.notes
    if reference is not None and reference.new is not None and reference.new.sum() < config.gate.least:
        notes = (
            *notes,
            "the served checkpoint was fitted on the reference's prompts, so its results there are optimistic",
        )
    verdict = assess(newest_holdout(data, champion), reference, config.gate, config.seed)
    figures = {
        "start": data.fit.initialisation.name,
        "epochs": data.fit.epochs,
        "held_out_loss": data.fit.loss,
        "new": int(champion.new.sum()),
    }
    verdict = dataclasses.replace(verdict, figures=nan_to_null({**verdict.figures, **figures}))
    return dataclasses.replace(data, champion=champion, verdict=verdict, notes=notes)


def champion_predictions(data: RefreshData) -> ChampionPredictions:
    """The champion's predictions on the examples, as they are served."""
    champion = data.inputs.start.champion
    if champion is None:
        return ChampionPredictions(None, np.ones(len(data.traffic.examples), bool))
    items = items_of(champion.initialisation, data)
    return ChampionPredictions(served_quality(champion, items), new_to(champion, data.traffic))


def newest_holdout(data: RefreshData, champion: ChampionPredictions) -> Holdout:
    """The newest held-out prompts."""
    assert data.candidate is not None
    rows = np.flatnonzero(data.candidate.newest)
    inverse = data.traffic.inverse[rows]
    return Holdout(
        pools=data.traffic.pools,
        candidate=data.candidate.quality[rows],
        champion=None if champion.quality is None else champion.quality[rows],
        observed=data.observed[rows],
        trust=data.weights[rows] / inverse,
        served=data.traffic.served[rows],
        inverse=inverse,
        folds=data.folds[rows],
        new=champion.new[rows],
        calibrated=data.candidate.calibrated[rows],
        conversation=data.traffic.conversation[rows],
    )


def reference_holdout(data: RefreshData) -> Holdout | None:
    """The reference set without questions that the candidate was fitted on; None if too few remain."""
    assert data.candidate is not None
    inputs, start = data.inputs, data.inputs.start
    if not inputs.reference:
        return None
    fitted = {question_key(example.prompt) for example in data.traffic.examples}
    examples = examples_of(inputs.reference, Pools(start.pools, tuple((pool,) for pool in start.pools)))
    examples = [example for example in examples if question_key(example.prompt) not in fitted]
    observed = labels_by_head(examples, start.pools)["quality"]
    if (~np.isnan(observed).any(1)).sum() < inputs.config.gate.least:
        return None
    learner = data.candidate.learner
    logits = learner.predict(inputs.cache.items(learner, examples))[0]
    quality = calibrate_quality(data.candidate.calibration.stages["full"], logits)
    champion = None
    if start.champion is not None:
        reader = start.champion.initialisation.learner(learner_config(inputs.config))
        champion = served_quality(start.champion, inputs.cache.items(reader, examples))
    ones, unknown = np.ones(len(examples)), np.full(len(examples), -1)
    return Holdout(start.pools, quality, champion, observed, ones, unknown, ones, new=new_to_all(examples, start))


def new_to_all(examples: Sequence[Example], start: StartingPoint) -> NDArray[np.bool_]:
    """Which examples (N,) neither the champion nor the base was fitted on."""
    manifests = {known.manifest.version: known.manifest for known in (start.champion, start.base) if known is not None}
    new: NDArray[np.bool_] = np.all([certainly_unseen(examples, manifest) for manifest in manifests.values()], 0)
    return new


def _last(count: int, length: int) -> NDArray[np.bool_]:
    """The last `length` of `count` examples (N,)."""
    rows: NDArray[np.bool_] = np.arange(count) >= count - length
    return rows
