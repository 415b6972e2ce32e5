"""The fixed reference set that no refresh may do worse on: an outcome table, its models taken for the pools."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from estimator import checkpoint
from training import data
from training.learner_settings import LearnerSettings


def reference_rows(settings: LearnerSettings, champion: Path) -> list[data.Row]:
    """The reference table's rows, their labels by pool; none where the settings name no table.

    A table names models: a pool's is `pools.NAME.model`, or the pool's own name.
    """
    if settings.reference is None:
        return []
    names = {pool: pool for pool in (*checkpoint.load_manifest(champion).pools, *settings.pools)}
    names |= {config.model: pool for pool, config in settings.pools.items()}

    def by_pool(labels: Mapping[str, float]) -> dict[str, float]:
        return {names[model]: value for model, value in labels.items() if model in names}

    rows = data.read_tables([Path(settings.reference)])
    found = [replace(row, correct=by_pool(row.correct), token_confidence=by_pool(row.token_confidence)) for row in rows]
    if not any(row.correct for row in found):
        raise ValueError(f"reference: {settings.reference} names none of the models {', '.join(names)}")
    return [row for row in found if row.correct]
