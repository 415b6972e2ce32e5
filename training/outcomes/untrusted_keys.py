"""Keys whose word contradicts what all other labels predict. Pure.

Each label's disagreement is its log-loss under a prediction that was not fitted on it, less what a truthful label's
would be on average. A key's mean is compared with the mean of the others' labels, in units of chance and of how keys
differ anyway. A key that always lies stands far out where predictions are sure; where they are not, its labels can't be
told from noise, and hardly do harm.

Shapes: L labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from depo_gateway.estimator.logistic import Array
from depo_gateway.training.outcomes.traffic_examples import Told

LEAST = 20  # labels of a key that can be judged
OFTEN = 0.05  # nats by which honest keys' means differ anyway (stricter users, harder tasks), at least
MINORITY = 1 / 3  # of all labels: when more of them seem to lie, who does can't be told
CLIP = 0.01


def disagreement(told: Sequence[Told], quality_NK: Array) -> Array:
    """(L,) nats, 0 on average where labels are drawn from the predictions."""
    p = np.array([quality_NK[one.example, one.pool] for one in told]).clip(CLIP, 1 - CLIP)
    label = np.array([one.quality for one in told])
    return np.asarray((p - label) * (np.log(p) - np.log(1 - p)))


def lying_keys(told: Sequence[Told], quality_NK: Array, threshold: float) -> tuple[Mapping[str, float], str]:
    """(key -> z-score, of those beyond the threshold; a remark, or "")."""
    found: dict[str, float] = {}
    rows: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(told):
        rows[one.key].append(number)
    if len(rows) < 2:
        return found, ""
    off = disagreement(told, quality_NK)
    means = {key: float(off[numbers].mean()) for key, numbers in rows.items() if len(numbers) >= LEAST}
    for key, mean in means.items():
        rest = np.ones(len(off), bool)
        rest[rows[key]] = False
        others = np.array([value for name, value in means.items() if name != key])
        middle = float(np.median(others)) if len(others) >= 3 else float(off[rest].mean())
        spread = 1.4826 * float(np.median(np.abs(others - middle))) if len(others) >= 3 else 0.0
        chance = max(float(off[rest].std()), float(off[rows[key]].std())) / len(rows[key]) ** 0.5
        z = (mean - middle) / float(np.hypot(chance, max(spread, OFTEN)))
        if z > threshold:
            found[key] = z
    share = sum(len(rows[key]) for key in found) / len(told)
    if share > MINORITY:
        names = ", ".join(map(repr, sorted(found)))
        return {}, f"the labels of {names} contradict the others', but are {share:.0%} of all: nobody is left out"
    return found, ""
