"""The process that trains for `depo-train refresh --follow`: each line it reads is a wish for one refresh.

It is apart from the learner so that a crash in training ends no loop, and lives on between refreshes because loading
torch and embedding old prompts anew cost minutes. What it writes is whole or has no name, so it may be killed anywhere.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from depo_gateway.estimator.records.store import Store, StoreError
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh import refresh
from depo_gateway.training.online.settings import LearnerSettings
from depo_gateway.training.rewards.worker_pool import end_with


def work(parent: int) -> None:
    """The process's whole life. Its first line holds {settings, base, out, cold}; it ends with its input."""
    end_with(parent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no result
    wish = json.loads(sys.stdin.readline())
    settings = learner_settings.parse_settings(wish["settings"])
    cache = EmbeddingCache()
    for _ in sys.stdin:
        print(json.dumps(once(settings, Path(wish["base"]), Path(wish["out"]), wish["cold"], cache)), file=answers)
        answers.flush()


def once(settings: LearnerSettings, base: Path, out: Path, cold: bool, cache: EmbeddingCache) -> Mapping[str, Any]:
    """One refresh as plain values: {seq, published, reasons, figures, labels, notes, standing}, or {failed, words}."""
    try:
        store = Store(learner_settings.database_url(settings.records))
        try:
            _, seq = store.count_labels()  # before they are read: a label that comes meanwhile counts as new
            labelled = store.labelled(settings.refresh.learn.newest)
        finally:
            store.close()
        reference = reference_rows(settings, base, out)
        outcome = refresh(labelled, base, out, settings.refresh.learn, reference, cache, cold)
    except StoreError as error:
        return {"failed": "records", "words": str(error)}
    except ValueError as error:
        return {"failed": "mistake", "words": str(error)}
    except OSError as error:
        return {"failed": "disk", "words": f"{error.filename}: {error.strerror}" if error.filename else str(error)}
    return {
        "seq": seq,
        "published": None if outcome.published is None else outcome.published.version,
        "reasons": list(outcome.verdict.reasons),
        "figures": dict(outcome.verdict.figures),
        "labels": outcome.labels,
        "notes": list(outcome.notes),
        "standing": None if outcome.standing is None else asdict(outcome.standing),
    }
