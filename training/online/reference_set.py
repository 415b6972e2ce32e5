"""The fixed reference set on which no refresh may route worse: an outcome table, its models mapped to pools."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from depo_gateway.estimator import checkpoint
from depo_gateway.training.online.champion_path import champion_path
from depo_gateway.training.online.settings import LearnerSettings
from depo_gateway.training.outcomes import table


def reference_rows(settings: LearnerSettings, base: Path, out: Path) -> list[table.Row]:
    """The reference table's rows with labels by pool; none where the settings name no table.

    A table names models. A pool's models are `pools.NAME.model`, those that the served checkpoint (`out`'s `current`,
    else `base`) was fitted on, and the pool's own name. Where a row has several of them, their mean counts.
    """
    if settings.reference is None:
        return []
    manifest = checkpoint.load_manifest(checkpoint.resolve(champion_path(base, out)))
    fitted = manifest.metrics.get("models", {})
    names = {model: pool for pool in manifest.pools for model in fitted.get(pool, ())}
    names |= {pool: pool for pool in (*manifest.pools, *settings.pools)}
    names |= {config.model: pool for pool, config in settings.pools.items()}

    def by_pool(labels: Mapping[str, float]) -> dict[str, float]:
        values_by_pool: dict[str, list[float]] = {}
        for model, value in labels.items():
            if model in names:
                values_by_pool.setdefault(names[model], []).append(value)
        return {pool: sum(values) / len(values) for pool, values in values_by_pool.items()}

    rows = [
        replace(row, correct=by_pool(row.correct), token_confidence=by_pool(row.token_confidence))
        for row in table.read_tables([Path(settings.reference)])
    ]
    if not any(row.correct for row in rows):
        raise ValueError(f"reference: {settings.reference} names none of the models {', '.join(names)}")
    return [row for row in rows if row.correct]
