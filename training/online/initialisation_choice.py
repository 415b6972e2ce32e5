"""Stage cross_fit of a refresh: held-out predictions of each initialisation, and the untrusted keys they reveal."""

from __future__ import annotations

import dataclasses

import numpy as np

from depo_gateway.training.online.cross_fit import calibrated_quality, cross_fit_initialisation
from depo_gateway.training.online.refresh_data import NothingToLearnError, RefreshData
from depo_gateway.training.online.training_set import items_of, select_examples, weigh_examples
from depo_gateway.training.outcomes.untrusted_keys import untrusted_keys


def cross_fit_examples(data: RefreshData) -> RefreshData:
    """Cross-fits every initialisation and chooses the one with the least held-out loss.

    Raises:
        NothingToLearnError: learning diverged.
    """
    config = data.inputs.config
    fits = []
    for initialisation in data.initialisations:
        items = items_of(initialisation, data, data.weights)
        fits.append((cross_fit_initialisation(initialisation, items, data.folds, data.new, config), items))
    best, items = min(fits, key=lambda fit: fit[0].loss)
    if not np.isfinite(best.loss):
        raise NothingToLearnError("learning diverged; lower learning_rate and wide_learning_rate", data.notes)
    new = np.ones(len(items), bool) if best.initialisation.fresh else data.new
    return dataclasses.replace(data, fit=best, items=items, new=new)


def exclude_untrusted_keys(data: RefreshData) -> RefreshData:
    """Repeats the stages so far without the claims of keys that contradict the held-out predictions, if there are any.

    Raises:
        NothingToLearnError: too little is left.
    """
    assert data.fit is not None
    predicted = calibrated_quality(data.fit.logits.full, data.observed, data.weights)
    untrusted, note = untrusted_keys(data.traffic.claims, predicted, data.inputs.config.traffic.lying)
    notes = [
        f"the labels claimed by key {key!r} contradict the predictions fitted on the other labels (z = {z:.1f}); they"
        " are left out"
        for key, z in sorted(untrusted.items())
    ]
    notes += [note] if note else []
    if untrusted:
        try:
            data = cross_fit_examples(weigh_examples(select_examples(data.inputs, untrusted)))
        except NothingToLearnError as error:
            raise NothingToLearnError(error.reason, (*error.notes, *notes)) from None
    return dataclasses.replace(data, notes=(*data.notes, *notes))
