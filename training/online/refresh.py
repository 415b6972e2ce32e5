"""`depo-train refresh`: continues training from served traffic, and publishes only what is shown to do no harm.

    select     labelled records -> examples, folds, initialisations                (training_set.py)
    weigh      importance weights, if traffic has changed                          (training_set.py)
    cross_fit  held-out predictions of each initialisation, the better one chosen  (initialisation_choice.py)
               and all three again without the claims of untrusted keys
    calibrate  the final model, calibrated on the newest held-out predictions      (holdout.py)
    judge      the publish gate compares it with the champion                      (holdout.py, publish_gate.py)
    publish    it is written and published, or refused with the reasons            (here)

Each stage takes and returns RefreshData (refresh_data.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from depo_gateway.estimator import checkpoint, export, standing
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.finite import NotFiniteError
from depo_gateway.estimator.records.reasons import reason_named
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.estimator.standing import Standing
from depo_gateway.training.evaluation.contamination import fingerprints
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.online.champion import StartingPoint, carried_targets, models_of, starting_point
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.holdout import calibrate_candidate, judge_candidate
from depo_gateway.training.online.initialisation_choice import cross_fit_examples, exclude_untrusted_keys
from depo_gateway.training.online.publish_gate import Verdict
from depo_gateway.training.online.refresh_config import NO_TEXT, REFUSALS, RefreshConfig
from depo_gateway.training.online.refresh_data import NothingToLearnError, RefreshData, RefreshInputs
from depo_gateway.training.online.router_standing import standing_of
from depo_gateway.training.online.training_set import select_examples, weigh_examples
from depo_gateway.training.outcomes.table import Row


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """The result of one refresh."""

    published: Manifest | None  # None: refused
    verdict: Verdict
    labels: int  # examples learned from
    standing: Standing | None  # of the checkpoint that is served now
    notes: tuple[str, ...] = ()  # what was not used, or could not be carried over
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
) -> RefreshResult:
    """Learns from labelled records, and publishes a new checkpoint into `out` or refuses.

    The champion is what `out/current` names, else `base`. Publishing writes a checkpoint `refresh-...`, `current` and
    standing.json; refusing appends a line to refusals.jsonl.

    Args:
        base: a checkpoint, a directory with `current`, or "builtin", whose two pools take the traffic's names in order.
        reference: rows of an outcome table, by pool name, on which no candidate may route worse.
        cold: without `out/current` there is no champion: fresh heads on the base's encoder, whatever its pools.
        publish: let `current` name the new checkpoint; else it is only written.

    Raises:
        ValueError: records without text, or of other pools than the champion's; a directory that can't be written.
    """
    checkpoint.ensure_free(out / f"refresh-{secrets.token_hex(4)}")
    if labelled and all(item.record.asked is None for item in labelled):
        raise ValueError(NO_TEXT)
    labelled = sorted(labelled, key=lambda item: (item.record.time, item.record.seq))[-config.newest :]
    start = starting_point(base, out, cold, labelled)
    inputs = RefreshInputs(labelled, start, config, reference, EmbeddingCache() if cache is None else cache)
    with one_thread():
        try:
            data = select_examples(inputs)
            data = weigh_examples(data)
            data = cross_fit_examples(data)
            data = exclude_untrusted_keys(data)
            data = calibrate_candidate(data)
            data = judge_candidate(data)
        except NothingToLearnError as error:
            return refuse_candidate(out, start, Verdict(False, (error.reason,), {}), 0, None, error.notes)
        return publish_candidate(data, out, publish)


def publish_candidate(data: RefreshData, out: Path, publish: bool) -> RefreshResult:
    """Writes the candidate and publishes it, or refuses it, as the verdict says."""
    assert data.candidate is not None
    assert data.fit is not None
    assert data.verdict is not None
    start, count = data.inputs.start, len(data.traffic.examples)
    if not data.verdict.publish:
        return refuse_candidate(out, start, data.verdict, count, champion_standing(data), data.notes)
    targets, lost = carried_targets(data.candidate.calibration, start.champion)
    calibration = dataclasses.replace(data.candidate.calibration, targets=targets)
    notes = (*data.notes, *lost)
    place = out / f"refresh-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    metrics = {
        "models": models_of(start.champion, start.pools),
        "labels": count,
        "trained_to": data.traffic.trained_to,
        "verdict": data.verdict.figures,
        "notes": list(notes),
        "fitted_on": fingerprints(data.traffic.examples),
    }
    with data.candidate.learner.averaged() as estimator:
        tokenizer = data.fit.initialisation.tokenizer
        try:
            manifest = export.export_checkpoint(place, estimator, tokenizer, calibration, metrics, parent=start.parent)
        except NotFiniteError as error:  # training diverged
            verdict = dataclasses.replace(data.verdict, publish=False, reasons=(f"training diverged: {error}",))
            return refuse_candidate(out, start, verdict, count, champion_standing(data), notes)
    now = candidate_standing(data, manifest.version)
    if publish:
        checkpoint.publish(place)
        if now is not None:
            standing.write_standing(out, now)
    return RefreshResult(manifest, data.verdict, count, now, notes, place)


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: steps on known embeddings are so small that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
