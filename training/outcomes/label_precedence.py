"""Which label counts where several sources labelled the same answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from depo_gateway.estimator.records.types import FEEDBACK, Label

VERIFIERS = ("exact", "math")  # sources that compare with the record's reference, which the client gave


TRUST = (*VERIFIERS, FEEDBACK, "webhook", "model")  # among sources that label as many pools; others come last


def _rank(source: str) -> int:
    return TRUST.index(source) if source in TRUST else len(TRUST)


def believed(labels: Sequence[Label], pools: tuple[str, ...]) -> dict[str, float]:
    """One quality a pool: of the source that labels the most pools, since two sources' scales differ.

    Among equals in the order of TRUST; pools that it leaves out take the next one's. As learning does.
    """
    by_source: dict[str, dict[str, float]] = defaultdict(dict)
    for label in labels:
        if label.quality is not None and label.pool in pools:
            by_source[label.source][label.pool] = label.quality
    order = {source: rank for rank, source in enumerate(TRUST)}
    quality: dict[str, float] = {}
    for source in sorted(by_source, key=lambda name: (-len(by_source[name]), order.get(name, len(order)), name)):
        quality = {**by_source[source], **quality}
    return quality
