"""Which label counts where several sources labelled the answers to one record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from depo_gateway.estimator.records.types import Label
from depo_gateway.training.judging.label_sources import source_rank


def preferred_labels(labels: Iterable[Label], pools: tuple[str, ...]) -> dict[str, Label]:
    """The one quality label of each pool that counts.

    The source that labels the most pools comes first, because qualities of pools are compared and the scales of two
    sources differ. Among equals the source of the lower rank comes first. Pools without a label from that source take
    the label of the next source.
    """
    by_source: dict[str, dict[str, Label]] = defaultdict(dict)
    for label in labels:
        if label.quality is not None and label.pool in pools:
            by_source[label.source][label.pool] = label
    preferred: dict[str, Label] = {}
    for source in sorted(by_source, key=lambda name: (-len(by_source[name]), source_rank(name), name)):
        for pool, label in by_source[source].items():
            preferred.setdefault(pool, label)
    return preferred


def preferred_qualities(labels: Iterable[Label], pools: tuple[str, ...]) -> dict[str, float]:
    """The quality of each pool's label that counts."""
    chosen = preferred_labels(labels, pools)
    return {pool: label.quality for pool, label in chosen.items() if label.quality is not None}
