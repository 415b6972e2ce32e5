"""A joint calibration of all pools' logits, folded into an estimator's weights.

With few labels the difference between two pools is overfitted more than what they have in common, how hard a prompt is.
A Platt a pool scales both alike and leaves the gain too steep. So, with m the mean of the pools' logits z_k:

    z'_k = common * m + difference * (z_k - m) + offset_k

by joint maximum likelihood on held-out logits: K + 2 numbers. The heads are linear, so weights can hold it: a
checkpoint needs nothing new.

Shapes: N examples, K pools, H = 2K outputs, quality at the even ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import enough_labels, sigmoid
from depo_gateway.estimator.model import Estimator
from depo_gateway.training.evaluation.routing_metrics import Array

LEAST_SLOPE = 0.05  # it never turns an order round
# Where `difference` is drawn to, and how strongly, in prompts: MMLU's usual value. Of a few hundred labels alone it may
# come out near 0, and then little is left of the order: APGR .537 of 500 labels, where the logits themselves have .640
DIFFERENCE, DIFFERENCE_WEIGHT = 0.7, 20.0
PASSES = 50


@dataclass(frozen=True, slots=True)
class Rotation:
    common: float
    difference: float
    offsets: tuple[float, ...]  # (K,)

    def apply(self, logits_NKH: Array) -> Array:
        """The same logits (N, K, 2), the qualities' rotated."""
        mixed = logits_NKH.copy()
        mixed[:, :, 0] = logits_NKH[:, :, 0] @ self.matrix.T + np.array(self.offsets)
        return mixed

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(K, K), symmetric: z' = z @ matrix + offsets."""
        count = len(self.offsets)
        return self.difference * np.eye(count) + (self.common - self.difference) / count


def none(pools: int) -> Rotation:
    return Rotation(1.0, 1.0, (0.0,) * pools)


def fit(logits_NKH: Array, observed_NK: Array, weights: Array) -> Rotation:
    """Weighted maximum likelihood by Newton's method; labels that are NaN are left out. A pool without enough labels:
    none at all, for pools are compared. A slight pull (ridge of one prompt, for the difference of more) keeps it finite
    where labels are separable.
    """
    count = observed_NK.shape[1]
    if count < 2 or not all(enough_labels(observed_NK[:, k], weights) for k in range(count)):
        return none(count)
    z = logits_NKH[:, :, 0]
    mean = np.repeat(z.mean(1, keepdims=True), count, 1)
    pool = np.broadcast_to(np.eye(count), (len(z), count, count))
    design = np.concatenate([np.stack([mean, z - mean], 2), pool], 2).reshape(-1, count + 2)
    targets = observed_NK.reshape(-1)
    every = np.repeat(weights / weights[weights > 0].mean(), count)
    seen = ~np.isnan(targets) & (every > 0)
    design, targets, every = design[seen], targets[seen], every[seen]
    start = np.array([1.0, DIFFERENCE, *[0.0] * count])
    ridge = np.array([1.0, DIFFERENCE_WEIGHT, *[1.0] * count])
    beta = start.copy()
    for _ in range(PASSES):
        p = sigmoid(design @ beta)
        slope = design.T @ (every * (targets - p)) - ridge * (beta - start)
        curvature = (design * (every * p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        beta += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-8:
            break
    common, difference = np.maximum(beta[:2], LEAST_SLOPE)
    return Rotation(float(common), float(difference), tuple(map(float, beta[2:])))


def fold(model: Estimator, rotation: Rotation) -> None:
    """Make a model answer with rotated logits, in both stages, in place."""
    matrix = torch.tensor(rotation.matrix, dtype=torch.float32, device=model.device)
    offsets = torch.tensor(rotation.offsets, dtype=torch.float32, device=model.device)
    config = model.config
    by_output: list[torch.Tensor] = (
        [model.wide_weight, model.surface_weight] if config.wide else []
    )  # outputs are the last dimension
    by_output += [model.trunk.heads.weight.T, model.trunk.heads.bias] if config.trunk else [model.deep_weight]
    by_output += [model.bias] if config.wide or not config.trunk else []
    with torch.no_grad():
        for weight in by_output:
            weight[..., 0::2] = weight[..., 0::2] @ matrix
        by_output[-1][0::2] += offsets  # the one bias, or the trunk's
