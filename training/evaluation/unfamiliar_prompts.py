"""Prompts that are unfamiliar to a checkpoint, in the figures of a routing.

The scores of such a prompt do not decide. By default the gateway draws a pool at the usual shares (`routing.unfamiliar:
share`). Figures count that draw: an unfamiliar prompt is decided by the prediction of a familiar one, chosen without
regard to either's outcome. So at every threshold unfamiliar prompts have the pools' shares of the familiar ones, and in
a ranking they lie evenly among them.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation.routing_metrics import routing_scores


def deciding_quality(quality_NK: Array, unfamiliar: NDArray[np.bool_], seed: int = 0) -> Array:
    """The quality (N, K) that routing goes by: as predicted; for an unfamiliar prompt, that of a random familiar one.

    Raises ValueError where no prompt is familiar.
    """
    known, strange = np.flatnonzero(~unfamiliar), np.flatnonzero(unfamiliar)
    if not len(strange):
        return quality_NK
    if not len(known):
        raise ValueError(
            f"all {len(strange)} prompts are unlike those that the checkpoint was fitted on, so its scores decide none"
            " of them and there is no routing to measure; fit one on prompts like these"
        )
    scores = routing_scores(quality_NK[known])
    ranked = known[np.argsort(scores.get("gain", scores["difficulty"]), kind="stable")]
    even = ranked[(np.arange(len(strange)) * 2 + 1) * len(ranked) // (2 * len(strange))]
    deciding = quality_NK.copy()
    deciding[strange] = quality_NK[np.random.default_rng(seed).permutation(even)]
    return deciding


def unfamiliar_share(unfamiliar: NDArray[np.bool_], runtime: Runtime) -> float | None:
    """For report.json; None where the checkpoint can't tell."""
    return None if runtime.calibration.familiarity is None else float(unfamiliar.mean())


def unfamiliar_note(share: float | None) -> str:
    """What a share of unfamiliar prompts means for the figures; "" where there are none, or none are known."""
    if not share:
        return ""
    return (
        f"{share:.1%} of the prompts are unfamiliar to the checkpoint: unlike those that it was fitted on. They count"
        " as routed at random, with the shares that the others have at the same threshold."
    )


def unfamiliar_message(unfamiliar: NDArray[np.bool_]) -> str:
    """One line on what a calibration did with unfamiliar prompts; "" without any."""
    if not unfamiliar.any():
        return ""
    return (
        f"{unfamiliar.sum()} of {len(unfamiliar)} prompts are unfamiliar to the checkpoint: probabilities are fitted to"
        " the others, and shares count these as routed at random\n"
    )
