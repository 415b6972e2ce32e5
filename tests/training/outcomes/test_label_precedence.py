"""Which label counts where several sources labelled one record."""

import pytest

from depo_gateway.estimator.records.types import FEEDBACK, Label
from depo_gateway.training.outcomes.label_precedence import preferred_labels, preferred_qualities

POOLS = ("small", "large")


def made(*labels: tuple[str, str, float | None]) -> list[Label]:
    return [Label(1, pool, source, quality) for source, pool, quality in labels]


@pytest.mark.parametrize(
    ("labels", "quality"),
    [
        ([(FEEDBACK, "small", 0.0), ("model", "small", 1.0), ("model", "large", 0.5)], {"small": 1.0, "large": 0.5}),
        ([("model", "small", 1.0), (FEEDBACK, "small", 0.0)], {"small": 0.0}),
        ([(FEEDBACK, "small", 0.0), ("math", "small", 1.0), ("exact", "small", 0.5)], {"small": 0.5}),
        ([("model", "small", 1.0), ("webhook", "small", 0.25)], {"small": 0.25}),
        ([("unheard-of", "small", 1.0), ("model", "small", 0.0)], {"small": 0.0}),
        ([(FEEDBACK, "small", 0.25), ("webhook", "large", 1.0)], {"small": 0.25, "large": 1.0}),
        ([("exact", "other", 1.0), ("none", "small", None)], {}),
    ],
)
def test_the_widest_source_counts_then_the_one_of_the_lowest_rank(
    labels: list[tuple[str, str, float | None]], quality: dict[str, float]
) -> None:
    assert preferred_qualities(made(*labels), POOLS) == quality


def test_each_label_keeps_its_source() -> None:
    found = preferred_labels(made((FEEDBACK, "small", 1.0), ("model", "small", 0.0), ("webhook", "large", 1.0)), POOLS)
    assert {pool: label.source for pool, label in found.items()} == {"small": FEEDBACK, "large": "webhook"}
