"""Stages select and weigh of a refresh: the examples that it learns from, and what each weighs.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import expanded
from depo_gateway.estimator.similarity import usual_centres
from depo_gateway.training.online.champion import LoadedCheckpoint, StartingPoint, new_to
from depo_gateway.training.online.covariate_shift import importance_weights
from depo_gateway.training.online.cross_fit import Initialisation, fresh_heads, learner_config
from depo_gateway.training.online.refresh_config import RefreshConfig
from depo_gateway.training.online.refresh_data import NothingToLearnError, RefreshData, RefreshInputs
from depo_gateway.training.outcomes.known_groups import known_groups
from depo_gateway.training.outcomes.table import folds_of
from depo_gateway.training.outcomes.traffic_examples import Traffic, claim_caps, examples_of_traffic

LARGELY_NEW = 0.8  # the least share of examples that are new to a checkpoint whose weights are continued


def select_examples(inputs: RefreshInputs, untrusted: Collection[str] = ()) -> RefreshData:
    """The examples, their folds, and the initialisations. Claims of untrusted keys are left out.

    Raises:
        NothingToLearnError: there are too few examples, or they can't be held out from each other.
    """
    config, start = inputs.config, inputs.start
    text = start.base.estimator.config.text
    traffic = examples_of_traffic(inputs.labelled, start.pools, text, config.traffic, untrusted)
    count, groups = len(traffic.examples), len(set(traffic.group.tolist()))
    if count < config.min_labels:
        reason = f"{count} labelled prompts are fewer than min_labels, {config.min_labels}"
        raise NothingToLearnError(reason, traffic.notes)
    if groups < 2:
        raise NothingToLearnError("all labelled prompts are near-duplicates, or from one conversation", traffic.notes)
    initialisations, new = initialisations_of(start, traffic, config)
    return RefreshData(
        inputs=inputs,
        traffic=traffic,
        observed=labels_by_head(traffic.examples, start.pools)["quality"],
        folds=folds_of([str(number) for number in traffic.group], min(config.folds, groups), config.seed),
        initialisations=initialisations,
        new=new,
        notes=traffic.notes,
        weights=np.array([example.weight for example in traffic.examples]),
    )


def weigh_examples(data: RefreshData) -> RefreshData:
    """Multiplies the weights by importance weights, if traffic has changed."""
    items = items_of(data.initialisations[0], data)
    importance = importance_weights(
        np.stack([item.embedding.double().cpu().numpy() for item in items if item.embedding is not None])
    )
    if importance.min() >= 1:
        return data
    mean = importance[importance < 1].mean()
    note = f"traffic has changed: older labels weigh {mean:.2f} on average"
    factors = importance * claim_caps(data.traffic, importance, data.inputs.config.traffic.key_share)
    return dataclasses.replace(data, weights=data.weights * factors, notes=(*data.notes, note))


def initialisations_of(
    start: StartingPoint, traffic: Traffic, config: RefreshConfig
) -> tuple[tuple[Initialisation, ...], NDArray[np.bool_]]:
    """(fresh heads, and a checkpoint's weights where they may be continued; the examples (N,) that are new to all).

    A checkpoint predicts the examples that it was fitted on better than others. So its weights are continued only if
    most of the examples are new to it: the champion's, else the base's.
    """
    centres = usual_centres(len(traffic.examples))
    heads = fresh_heads(start.base.estimator, start.pools, config.seed, known_groups(traffic.examples), centres)
    fresh = Initialisation("fresh", heads, start.base.tokenizer, True)
    for known in (start.champion, None if start.cold else start.base):
        if known is None or known.estimator.config.pools != start.pools:
            continue
        new = new_to(known, traffic)
        if known.estimator.config.text == start.base.estimator.config.text and new.mean() >= LARGELY_NEW:
            return (fresh, expanded_initialisation(known, traffic, centres)), new
    return (fresh,), np.ones(len(traffic.examples), bool)


def expanded_initialisation(known: LoadedCheckpoint, traffic: Traffic, centres: int) -> Initialisation:
    """A checkpoint's weights, with room for the traffic's groups and for centres of its prompts."""
    config = known.estimator.config
    groups = known_groups(traffic.examples, config.groups)
    added = centres if config.centres else 0
    grown = expanded(known.estimator, groups, added)
    return dataclasses.replace(known.initialisation, model=grown, empty_centres=added)


def items_of(initialisation: Initialisation, data: RefreshData, weights: Array | None = None) -> Sequence[Item]:
    """The examples as an initialisation reads them, with other weights (N,) than their own if these are given."""
    learner = initialisation.learner(learner_config(data.inputs.config))
    items = data.inputs.cache.items(learner, data.traffic.examples)
    if weights is None:
        return items
    return [dataclasses.replace(item, weight=weight) for item, weight in zip(items, weights.tolist(), strict=True)]
