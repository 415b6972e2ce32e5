"""Which groups of prompts get weights of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from depo_gateway.estimator.records.types import Example

FEWEST_PROMPTS = 5  # of a group: with fewer its weights stay near 0, and every request with a header makes one
MOST_GROUPS = 1000


def known_groups(examples: Sequence[Example], before: Sequence[str] = ()) -> tuple[str, ...]:
    """The largest groups of the examples, by name, after those known `before`."""
    sizes = Counter(example.task for example in examples if example.task and example.task not in set(before))
    large = [name for name, size in sizes.most_common() if size >= FEWEST_PROMPTS]
    return (*before, *sorted(large[: max(0, MOST_GROUPS - len(before))]))
