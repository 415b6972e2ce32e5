"""Stage publish of a refresh: the candidate is written and published, held back for its owner, or refused.

A candidate that passed the publish gate is held back if it would raise the cost of live traffic by more than the
owner's gate allows: it is written, held.json names it, and `current` stays until the owner accepts it
(`depo-train accept`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator import checkpoint, export, held_publish, standing
from depo_gateway.estimator.calibration import Calibration, calibrate_quality
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.finite import NotFiniteError
from depo_gateway.estimator.held_publish import PUBLISH_CHANGE, HeldPublish
from depo_gateway.estimator.records.reasons import reason_named
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Record
from depo_gateway.estimator.standing import Standing
from depo_gateway.training.evaluation.contamination import fingerprints
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.online.champion import StartingPoint, carried_targets, models_of, served_quality
from depo_gateway.training.online.cross_fit import learner_config
from depo_gateway.training.online.publish_change import (
    LIVE_RECORDS,
    PublishChange,
    UnknownChangeError,
    live_traffic,
    measure_change,
)
from depo_gateway.training.online.publish_gate import Verdict
from depo_gateway.training.online.refresh_config import REFUSALS, OwnerGate
from depo_gateway.training.online.refresh_data import RefreshData
from depo_gateway.training.online.router_standing import standing_of
from depo_gateway.training.online.settings import LearnerSettings


@dataclass(frozen=True, slots=True)
class OwnerTerms:
    """Live traffic, by which a publish's change is measured, and what its owner allows.

    Without live records the change is unknown: the candidate is published, and a note says so.
    """

    live: Sequence[Record] = ()  # the newest records, labelled or not, oldest first
    costs: Mapping[str, float] | None = None  # by pool, where the records do not name them
    gate: OwnerGate = field(default_factory=OwnerGate)
    publish: bool = True  # False: the candidate is only written


def owner_terms(store: Store, settings: LearnerSettings, publish: bool = True) -> OwnerTerms:
    """The newest records of the store, the pools' costs and the gate of learner.yaml."""
    live = [item.record for item in store.logged(LIVE_RECORDS)]
    costs = {name: pool.cost for name, pool in settings.pools.items()} or None
    return OwnerTerms(live, costs, settings.gate, publish)


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """The result of one refresh."""

    published: Manifest | None  # None: refused or held
    verdict: Verdict
    labels: int  # examples learned from
    standing: Standing | None  # of the checkpoint that is served now
    notes: tuple[str, ...] = ()  # what was not used, or could not be carried over
    place: Path | None = None  # the new checkpoint
    change: PublishChange | None = None  # what the publish changes; None: unknown, or there is no candidate
    held: HeldPublish | None = None  # the checkpoint is written and waits for its owner


def publish_candidate(data: RefreshData, out: Path, terms: OwnerTerms) -> RefreshResult:
    """Writes the candidate and publishes it, holds it, or refuses it, as the verdict and the owner's gate say."""
    assert data.candidate is not None
    assert data.verdict is not None
    start, count = data.inputs.start, len(data.traffic.examples)
    if not data.verdict.publish:
        return refuse_candidate(out, start, data.verdict, count, champion_standing(data), data.notes)
    targets, lost = carried_targets(data.candidate.calibration, start.champion)
    calibration = dataclasses.replace(data.candidate.calibration, targets=targets)
    change, unknown = publish_change(data, calibration, terms)
    notes = (*data.notes, *lost, *unknown)
    place = out / f"refresh-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    try:
        manifest = _write(data, place, calibration, notes, change)
    except NotFiniteError as error:  # training diverged
        verdict = dataclasses.replace(data.verdict, publish=False, reasons=(f"training diverged: {error}",))
        return refuse_candidate(out, start, verdict, count, champion_standing(data), notes)
    now = candidate_standing(data, manifest.version)
    most = terms.gate.max_cost_increase
    if terms.publish and change is not None and change.cost_increase > most:
        return _hold(data, out, place, manifest, change, most, now, notes)
    if terms.publish:
        checkpoint.publish(place)
        held_publish.remove_held(out)  # an older one, which this one replaces
        if now is not None:
            standing.write_standing(out, now)
    return RefreshResult(manifest, data.verdict, count, now, notes, place, change)


def publish_change(
    data: RefreshData, calibration: Calibration, terms: OwnerTerms
) -> tuple[PublishChange | None, tuple[str, ...]]:
    """(what publishing the candidate changes for live traffic; a note where that is unknown)."""
    assert data.candidate is not None
    start, cache = data.inputs.start, data.inputs.cache
    try:
        traffic = live_traffic(terms.live, start.pools, terms.costs)
        learner = data.candidate.learner
        examples = traffic.examples(learner.model.config.text)
        quality = calibrate_quality(calibration.stages["full"], learner.predict(cache.items(learner, examples))[0])
        before = None
        if start.champion is not None:
            reader = start.champion.initialisation.learner(learner_config(data.inputs.config))
            items = cache.items(reader, traffic.examples(reader.model.config.text))
            before = served_quality(start.champion, items), start.champion.calibration
        return measure_change(traffic, before, (quality, calibration)), ()
    except UnknownChangeError as error:
        return None, (f"the change in large share and cost is unknown and not gated: {error}",)


def held_sentence(name: str, change: PublishChange, most: float, out: Path) -> str:
    """What is held, the numbers, and how to accept it or raise the gate."""
    what = "the cost" if change.cost_change is not None else "the large share (the pools' costs are unknown)"
    return (
        f"{name} is held back: {change.describe()}; {what} would rise by {100 * change.cost_increase:.1f} points, and"
        f" gate.max_cost_increase allows {100 * most:.4g}; publish it with `depo-train accept --out {out}`, or raise"
        " gate.max_cost_increase"
    )


def _write(
    data: RefreshData, place: Path, calibration: Calibration, notes: Sequence[str], change: PublishChange | None
) -> Manifest:
    """Writes the candidate as a checkpoint. Raises NotFiniteError for weights that are NaN or infinite."""
    assert data.candidate is not None
    assert data.fit is not None
    assert data.verdict is not None
    start = data.inputs.start
    metrics: dict[str, Any] = {
        "models": models_of(start.champion, start.pools),
        "labels": len(data.traffic.examples),
        "trained_to": data.traffic.trained_to,
        "verdict": data.verdict.figures,
        "notes": list(notes),
        "fitted_on": fingerprints(data.traffic.examples, data.fit.initialisation.parent),
    }
    if change is not None:
        metrics[PUBLISH_CHANGE] = change.plain()
    with data.candidate.learner.averaged() as estimator:
        tokenizer = data.fit.initialisation.tokenizer
        return export.export_checkpoint(place, estimator, tokenizer, calibration, metrics, parent=start.parent)


def _hold(
    data: RefreshData,
    out: Path,
    place: Path,
    manifest: Manifest,
    change: PublishChange,
    most: float,
    now: Standing | None,
    notes: tuple[str, ...],
) -> RefreshResult:
    """Leaves `current` as it is, and puts the candidate into held.json and the log of refusals."""
    assert data.verdict is not None
    start = data.inputs.start
    sentence = held_sentence(place.name, change, most, out)
    champion = "" if start.champion is None else start.champion.manifest.version
    held = HeldPublish(
        place.name, manifest.version, champion, time.time(), sentence, change.share_change, change.cost_change, now
    )
    verdict = dataclasses.replace(
        data.verdict, publish=False, reasons=(sentence,), figures={**data.verdict.figures, "change": change.plain()}
    )
    count = len(data.traffic.examples)
    refused = refuse_candidate(out, start, verdict, count, champion_standing(data), notes)
    held_publish.write_held(out, held)
    return dataclasses.replace(refused, place=place, change=change, held=held)


def refuse_candidate(
    out: Path, start: StartingPoint, verdict: Verdict, count: int, now: Standing | None, notes: tuple[str, ...]
) -> RefreshResult:
    """Appends the refusal to the log, and updates the standing of the served checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "champion": start.parent,
        "labels": count,
        "reasons": verdict.reasons,
        "figures": verdict.figures,
        "notes": notes,
    }
    with open(out / REFUSALS, "a", encoding="utf-8") as file:
        file.write(json.dumps(nan_to_null(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if now is not None:
        standing.write_standing(out, now)
    return RefreshResult(None, verdict, count, now, notes)


def candidate_standing(data: RefreshData, version: str) -> Standing | None:
    """The standing of the candidate, on the newest held-out predictions."""
    assert data.candidate is not None
    rows = np.flatnonzero(data.candidate.newest)
    quality, observed, folds = data.candidate.quality[rows], data.observed[rows], data.folds[rows]
    return standing_of(version, time.time(), quality, observed, folds, scored_large_share(data))


def champion_standing(data: RefreshData) -> Standing | None:
    """The standing of the champion, on the examples that are new to it; None where there is no champion."""
    assert data.champion is not None
    champion, quality = data.inputs.start.champion, data.champion.quality
    if champion is None or quality is None:
        return None
    rows = np.flatnonzero(data.champion.new & (data.weights > 0))
    version, share = champion.manifest.version, scored_large_share(data)
    return standing_of(version, time.time(), quality[rows], data.observed[rows], None, share)


def scored_large_share(data: RefreshData) -> float:
    """The last pool's share of the requests that scores or random routing decided; without any, a half."""
    last = data.inputs.start.pools[-1]
    labelled = data.inputs.labelled
    routed = [item.record.pool for item in labelled if (why := reason_named(item.record.reason)) and why.free]
    return sum(pool == last for pool in routed) / len(routed) if routed else 0.5
