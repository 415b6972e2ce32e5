"""Untrusted annotators: detects API keys whose labels disagree with predictions fitted on the other labels. Pure.

A label's disagreement is its log-loss under a prediction that was not fitted on it, less the expected log-loss of a
truthful label. A key's mean is compared with the mean of the others' labels, in units of chance and of how much honest
keys differ. A key that always labels falsely is detected where predictions are certain. Where they are not, its labels
are indistinguishable from noise, and do little harm.

Shapes: L claims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.training.outcomes.traffic_examples import Claim

LEAST_CLAIMS = 20  # of a key that can be judged
HONEST_SPREAD = 0.05  # nats by which the means of honest keys differ (stricter users, harder tasks), at least
LARGEST_SHARE = 1 / 3  # of all labels: if the keys found have more, it is unclear which side is wrong
PROBABILITY_CLIP = 0.01


def disagreement(claims: Sequence[Claim], quality_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """(L,) nats, 0 on average where labels are drawn from the predictions."""
    p = np.array([quality_NK[claim.example, claim.pool] for claim in claims]).clip(
        PROBABILITY_CLIP, 1 - PROBABILITY_CLIP
    )
    label = np.array([claim.quality for claim in claims])
    return np.asarray((p - label) * (np.log(p) - np.log(1 - p)))


def untrusted_keys(
    claims: Sequence[Claim], quality_NK: NDArray[np.float64], threshold: float
) -> tuple[Mapping[str, float], str]:
    """(key -> z-score, of the keys beyond the threshold; a note, or "")."""
    untrusted: dict[str, float] = {}
    rows: dict[str, list[int]] = defaultdict(list)
    for number, claim in enumerate(claims):
        rows[claim.key].append(number)
    if len(rows) < 2:
        return untrusted, ""
    off = disagreement(claims, quality_NK)
    means = {key: float(off[numbers].mean()) for key, numbers in rows.items() if len(numbers) >= LEAST_CLAIMS}
    for key, mean in means.items():
        rest = np.ones(len(off), bool)
        rest[rows[key]] = False
        others = np.array([value for name, value in means.items() if name != key])
        middle = float(np.median(others)) if len(others) >= 3 else float(off[rest].mean())
        spread = 1.4826 * float(np.median(np.abs(others - middle))) if len(others) >= 3 else 0.0
        chance = max(float(off[rest].std()), float(off[rows[key]].std())) / len(rows[key]) ** 0.5
        z = (mean - middle) / float(np.hypot(chance, max(spread, HONEST_SPREAD)))
        if z > threshold:
            untrusted[key] = z
    share = sum(len(rows[key]) for key in untrusted) / len(claims)
    if share > LARGEST_SHARE:
        names = ", ".join(map(repr, sorted(untrusted)))
        return {}, f"the labels of {names} contradict the others', but are {share:.0%} of all: no key is left out"
    return untrusted, ""
