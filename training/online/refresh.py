"""`depo-train refresh`: continue training from served traffic; publish only what is shown to do no harm.

Labelled records become examples (traffic.py). Starts are cross-fitted, near-same prompts and turns of a conversation
together: a checkpoint's own weights, and fresh heads on its encoder. Keys that contradict what the other labels predict
are left out, and it is fitted anew. The better start is fitted on everything and calibrated on the newest held-out
predictions. The gate (gate.py) compares it with the champion; then it is published, or refused with the reasons.

A checkpoint that was fitted on an example predicts it better than it will predict others. So whatever is compared or
calibrated is so on examples that are new to both sides, and a start continues only from a checkpoint to which most of
the examples are new: the champion at first and where it knows what is forgotten since, else the base.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from depo_gateway.estimator import checkpoint, export, standing
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.records.types import SCORED, Labelled
from depo_gateway.estimator.standing import Standing
from depo_gateway.training.evaluation.contamination import fingerprints
from depo_gateway.training.evaluation.report import finite
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.online import joint_calibration
from depo_gateway.training.online.champion import (
    Standpoint,
    carried_targets,
    honest,
    models_of,
    predicted_by,
    standpoint_of,
)
from depo_gateway.training.online.covariate_shift import likeness
from depo_gateway.training.online.cross_fit import (
    Start,
    calibrated,
    cross_fit,
    finish,
    fresh_heads,
    learner_config,
)
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.holdout import Learned, calibrated_on, judged, last, on_reference
from depo_gateway.training.online.publish_gate import Verdict, judge, log_loss, standing_of
from depo_gateway.training.online.refresh_config import NO_TEXT, REFUSALS, RefreshConfig
from depo_gateway.training.outcomes.table import Row, folds_of, labels
from depo_gateway.training.outcomes.traffic_examples import Traffic, examples_of_traffic, kept_in_bounds
from depo_gateway.training.outcomes.untrusted_keys import lying_keys

WIDE = 1500  # examples: without drift a calibration on fewer is rougher
NEW_ENOUGH = 0.8  # of the examples must be new to a checkpoint that a start continues from


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one refresh."""

    published: Manifest | None
    verdict: Verdict
    labels: int  # examples learned from
    standing: Standing | None  # of the checkpoint that is served now
    notes: tuple[str, ...] = ()  # what was not believed, or could not be carried over
    place: Path | None = None  # the new checkpoint


def refresh(
    labelled: Sequence[Labelled],
    base: Path,
    out: Path,
    config: RefreshConfig,
    reference: Sequence[Row] = (),
    cache: EmbeddingCache | None = None,
    cold: bool = False,
    publish: bool = True,
) -> Outcome:
    """Learn from labelled records, and publish into `out` or refuse.

    The champion is what `out/current` names, else `base`. Writes a checkpoint `refresh-...`, `current` and
    standing.json; of a refusal a line in refusals.jsonl.

    Args:
        base: a checkpoint, a directory with `current`, or "builtin", whose two pools stand for the traffic's in order.
        reference: rows of an outcome table, by pool name, on which no candidate may route worse.
        cold: without `out/current` there is no champion: fresh heads on the base's encoder, whatever pools that scores.
        publish: let `current` name the new checkpoint; else it is only written.

    Raises:
        ValueError: records without text, or of other pools than the champion's; a directory that can't be written.
    """
    checkpoint.ensure_free(out / f"refresh-{secrets.token_hex(4)}")
    if labelled and all(item.record.asked is None for item in labelled):
        raise ValueError(NO_TEXT)
    labelled = sorted(labelled, key=lambda item: (item.record.time, item.record.seq))[-config.newest :]
    at = standpoint_of(base, out, cold, labelled)
    cache = EmbeddingCache() if cache is None else cache
    with one_thread():
        learned, notes = learn(labelled, at, config, cache)
        if isinstance(learned, str):
            return refused(out, at, Verdict(False, (learned,), {}), 0, None, notes)
        share = large_share(labelled, at.pools)
        return decided(learned, at, out, config, reference, cache, share, notes, publish)


def learn(
    labelled: Sequence[Labelled], at: Standpoint, config: RefreshConfig, cache: EmbeddingCache
) -> tuple[Learned | str, tuple[str, ...]]:
    """(the better start, cross-fitted without lying keys, or why there is none; notes)."""
    learned, notes = learn_from(labelled, at, config, cache, {})
    if isinstance(learned, str):
        return learned, notes
    predicted = calibrated(learned.best.held.full, learned.observed, learned.weights)
    lying, remark = lying_keys(learned.traffic.told, predicted, config.traffic.lying)
    said = [
        f"the word of key {key!r} contradicts what the other labels predict (z = {z:.1f}); it is left out"
        for key, z in sorted(lying.items())
    ]
    if lying:
        learned, notes = learn_from(labelled, at, config, cache, lying)
    return learned, (*notes, *said, *([remark] if remark else []))


def learn_from(
    labelled: Sequence[Labelled],
    at: Standpoint,
    config: RefreshConfig,
    cache: EmbeddingCache,
    distrusted: Mapping[str, float],
) -> tuple[Learned | str, tuple[str, ...]]:
    """Cross-fit every start on what is believed of the records."""
    traffic = examples_of_traffic(labelled, at.pools, at.base.estimator.config.text, config.traffic, distrusted)
    count, groups = len(traffic.examples), len(set(traffic.together.tolist()))
    if count < config.min_labels:
        return f"{count} labelled prompts are fewer than min_labels, {config.min_labels}", traffic.notes
    if groups < 2:
        return "all labelled prompts are near-same, or of one conversation", traffic.notes
    folds = folds_of([str(number) for number in traffic.together], min(config.folds, groups), config.seed)
    starts, fair = starts_of(at, traffic, config)
    like = likeness_of(items_of(starts[0], traffic, config, cache))
    notes = traffic.notes
    if like.min() < 1:
        notes = (*notes, f"traffic has changed: older labels weigh {like[like < 1].mean():.2f} on average")
        like = like * kept_in_bounds(traffic, like, config.traffic.key_share)
    fits = []
    for start in starts:
        items = [
            dataclasses.replace(item, weight=item.weight * factor)
            for item, factor in zip(items_of(start, traffic, config, cache), like.tolist(), strict=True)
        ]
        fits.append((cross_fit(start, items, folds, fair, config), items))
    best, items = min(fits, key=lambda fit: fit[0].loss)
    if not np.isfinite(best.loss):
        return "learning diverged; lower learning_rate and wide_learning_rate", notes
    observed, _ = labels(traffic.examples, at.pools)
    weights = np.array([example.weight for example in traffic.examples]) * like
    clean = np.ones(count, bool) if best.start.fresh else fair
    return Learned(traffic, observed, weights, folds, items, best, clean), notes


def likeness_of(items: Sequence[Item]) -> Array:
    """What each example still counts for (N,), by how much it looks like the newest."""
    return likeness(np.stack([item.embedding.double().cpu().numpy() for item in items if item.embedding is not None]))


def starts_of(at: Standpoint, traffic: Traffic, config: RefreshConfig) -> tuple[list[Start], NDArray[np.bool_]]:
    """(fresh heads and, where one may be continued, a checkpoint; the examples (N,) that are new to all of them)."""
    heads = fresh_heads(at.base.estimator, at.pools, config.seed)
    fresh = Start("fresh", heads, at.base.tokenizer, True)
    for known in (at.champion, None if at.cold else at.base):
        if known is None or known.estimator.config.pools != at.pools:
            continue
        fair = honest(known, traffic)
        if known.estimator.config.text == at.base.estimator.config.text and fair.mean() >= NEW_ENOUGH:
            return [fresh, known.start], fair
    return [fresh], np.ones(len(traffic.examples), bool)


def items_of(start: Start, traffic: Traffic, config: RefreshConfig, cache: EmbeddingCache) -> list[Item]:
    """The examples as a start reads them."""
    return cache.items(start.learner(learner_config(config)), traffic.examples)


def decided(
    learned: Learned,
    at: Standpoint,
    out: Path,
    config: RefreshConfig,
    reference: Sequence[Row],
    cache: EmbeddingCache,
    share: float,
    notes: tuple[str, ...],
    publish: bool,
) -> Outcome:
    """The final model, its calibration and the verdict; written and published, or refused."""
    traffic, best = learned.traffic, learned.best
    count = len(traffic.examples)
    newest = last(count, max(config.held_out_least, round(config.held_out * count))) & learned.fair
    recent = last(count, max(config.recent, round(config.held_out * count))) & learned.fair
    wide = last(count, max(WIDE, round(config.held_out * count))) & learned.fair
    calibrations = [calibrated_on(rows, learned, at) for rows in (recent, wide)]
    losses = [float(np.nanmean(log_loss(quality, learned.observed)[recent])) for *_, quality in calibrations]
    calibration, turned, quality = calibrations[int(losses[1] < losses[0])]
    on = (recent, wide)[int(losses[1] < losses[0])]
    served, new = None, np.ones(count, bool)
    if at.champion is not None:
        served = predicted_by(at.champion, items_of(at.champion.start, traffic, config, cache))
        new = honest(at.champion, traffic)
    learner = finish(best, learned.items, config)
    joint_calibration.fold(learner.model, turned)
    fixed = on_reference(reference, learner, calibration, at, traffic, config, cache)
    if fixed is not None and fixed.new is not None and fixed.new.sum() < config.gate.least:
        notes = (*notes, "what is served was fitted on the reference's prompts, and looks better there than it is")
    verdict = judge(judged(newest, new, on, quality, served, learned), fixed, config.gate, config.seed)
    figures = {"start": best.start.name, "epochs": best.epochs, "held_out_loss": best.loss, "new": int(new.sum())}
    verdict = dataclasses.replace(verdict, figures=finite({**verdict.figures, **figures}))
    if not verdict.publish:
        now = None
        if at.champion is not None and served is not None:
            rows = np.flatnonzero(new & (learned.weights > 0))
            version = at.champion.manifest.version
            now = standing_of(version, time.time(), served[rows], learned.observed[rows], None, share)
        return refused(out, at, verdict, count, now, notes)
    targets, lost = carried_targets(calibration, at.champion)
    calibration = dataclasses.replace(calibration, targets=targets)
    place = out / f"refresh-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    metrics = {
        "models": models_of(at.champion, at.pools),
        "labels": count,
        "trained_to": traffic.trained_to,
        "verdict": verdict.figures,
        "notes": [*notes, *lost],
        "fitted_on": fingerprints(traffic.examples),
    }
    with learner.averaged() as estimator:
        manifest = export.export_checkpoint(
            place, estimator, best.start.tokenizer, calibration, metrics, parent=at.parent
        )
    rows = np.flatnonzero(newest)
    now = standing_of(manifest.version, time.time(), quality[rows], learned.observed[rows], learned.folds[rows], share)
    if publish:
        checkpoint.publish(place)
        if now is not None:
            standing.write_standing(out, now)
    return Outcome(manifest, verdict, count, now, (*notes, *lost), place)


def large_share(labelled: Sequence[Labelled], pools: tuple[str, ...]) -> float:
    """The last pool's share of the requests that scores or chance routed; without any, a half."""
    routed = [item.record.pool for item in labelled if item.record.reason in SCORED]
    return sum(pool == pools[-1] for pool in routed) / len(routed) if routed else 0.5


def refused(
    out: Path, at: Standpoint, verdict: Verdict, count: int, now: Standing | None, notes: tuple[str, ...]
) -> Outcome:
    """A refusal on record, and how what is served still stands."""
    out.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "champion": at.parent,
        "labels": count,
        "reasons": verdict.reasons,
        "figures": verdict.figures,
        "notes": notes,
    }
    with open(out / REFUSALS, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if now is not None:
        standing.write_standing(out, now)
    return Outcome(None, verdict, count, now, notes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps on known embeddings are too small to share: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
