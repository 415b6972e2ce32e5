"""The process that trains for `depo-train refresh --follow`: each input line requests one refresh.

It is separate from the daemon, so that a crash in training ends no loop. It keeps running between refreshes, because
loading torch and embedding old prompts again takes minutes. Files are renamed only when complete, so it may be killed
at any moment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.estimator.records.store import Store, StoreError
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.publication import owner_terms
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh import refresh
from depo_gateway.training.online.settings import LearnerSettings
from depo_gateway.training.rewards.worker_pool import exit_with_parent


def serve_refreshes(parent: int) -> None:
    """Runs refreshes until the input ends. Its first line holds {settings, base, out, cold}."""
    exit_with_parent(parent)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries does not mix with results
    request = json.loads(sys.stdin.readline())
    settings = learner_settings.parse_settings(request["settings"])
    cache = EmbeddingCache()
    for _ in sys.stdin:
        result = run_refresh(settings, Path(request["base"]), Path(request["out"]), request["cold"], cache)
        print(json.dumps(result), file=results, flush=True)


def run_refresh(
    settings: LearnerSettings, base: Path, out: Path, cold: bool, cache: EmbeddingCache
) -> Mapping[str, Any]:
    """One refresh; its result as plain values: the fields of TrainerResult, or {failed, message}."""
    try:
        store = Store(database_url(settings.records))
        try:
            _, seq = (
                store.count_labels()
            )  # before the records are read: a label that is written meanwhile counts as new
            labelled = store.labelled(settings.refresh.learn.newest)
            terms = owner_terms(store, settings)
        finally:
            store.close()
        reference = reference_rows(settings, base, out)
        result = refresh(labelled, base, out, settings.refresh.learn, reference, cache, cold, terms)
    except StoreError as error:
        return {"failed": "records", "message": str(error)}
    except ValueError as error:
        return {"failed": "mistake", "message": str(error)}
    except OSError as error:
        return {"failed": "disk", "message": f"{error.filename}: {error.strerror}" if error.filename else str(error)}
    return {
        "seq": seq,
        "published": None if result.published is None else result.published.version,
        "reasons": list(result.verdict.reasons),
        "figures": dict(result.verdict.figures),
        "labels": result.labels,
        "notes": list(result.notes),
        "change": None if result.change is None else result.change.describe(),
        "held": None if result.held is None else result.held.sentence,
        "standing": None if result.standing is None else asdict(result.standing),
    }
