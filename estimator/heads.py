"""The estimator's heads: what it predicts of a prompt for every pool. No torch.

HEADS is the one place that lists them. A new head is one more row: the model's outputs, the loss, the calibration, the
checkpoint and `Runtime` follow. Its labels go into `Example.others` under its name; an outcome table holds them under
the same name, beside `correct`. Checkpoints keep the heads that they were fitted with.

Shapes: N prompts, K pools, H heads. A model's outputs are flat, (N, K * H): pool by pool, each with its heads in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.records.types import Example


@dataclass(frozen=True, slots=True)
class Head:
    """One prediction a pool, in [0, 1], trained by cross-entropy."""

    name: str  # in manifests, calibrations and scores, and of its labels
    term: str  # its loss term in logs and metrics
    scale: float = 1.0  # of its cross-entropy
    weight: str | None = None  # the field of LearnerConfig that weighs its term; None: 1


HEADS: tuple[Head, ...] = (
    Head("quality", "advantage"),  # mean reward; routing reads this one, so it is always the first
    Head("token_confidence", "distillation", 0.5, "distillation_weight"),
)
QUALITY = 0  # the index of the head that routing reads
ORIGINAL = ("quality", "token_confidence")  # heads of a checkpoint whose manifest names none


def head_names() -> tuple[str, ...]:
    return tuple(head.name for head in HEADS)


def heads_named(names: Iterable[str]) -> tuple[Head, ...]:
    """The rows of HEADS with these names, in this order. Raises ValueError for a name that has none."""
    known = {head.name: head for head in HEADS}
    names = tuple(names)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"the head {missing[0]!r} is unknown; this version has {', '.join(known)}")
    return tuple(known[name] for name in names)


def split_heads(outputs: Any, heads: int) -> Any:
    """Outputs (N, K * H) -> (N, K, H), of numpy or torch."""
    return outputs.reshape(len(outputs), -1, heads)


def labels_by_head(
    examples: Sequence[Example], pools: Sequence[str], heads: Iterable[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """The labels of each head (default: of HEADS), (N, K), NaN where there is none."""
    return {
        head: np.array([pool_labels(example, head, pools) for example in examples], float).reshape(-1, len(pools))
        for head in (head_names() if heads is None else heads)
    }


def pool_labels(example: Example, head: str, pools: Sequence[str]) -> tuple[float, ...]:
    """An example's labels of one head (K,), NaN where there is none."""
    known = example.labels(head)
    found = (known.get(pool) for pool in pools)
    return tuple(float("nan") if value is None else float(value) for value in found)
