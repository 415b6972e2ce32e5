"""A joint calibration of all pools' logits, folded into an estimator's weights.

With few labels the difference between two pools is overfitted more than their common part, how hard a prompt is.
Platt scaling of each pool scales both alike and leaves the gain too steep. So, with m the mean of the logits z_k:

    z'_k = common * m + difference * (z_k - m) + offset_k

fitted by joint maximum likelihood on held-out logits: K + 2 parameters. The heads are linear, so their weights can hold
the transform, and a checkpoint needs no new field.

Shapes: N examples, K pools, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import enough_labels
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.logistic import fit_logistic
from depo_gateway.estimator.model import Estimator

LEAST_SLOPE = 0.05  # above 0, so that it never reverses an order
# The prior mean of `difference` (MMLU's usual value), and its strength in prompts. A few hundred labels alone may give
# a value near 0, and then little is left of the order: APGR .537 from 500 labels, where the logits themselves have .640
DIFFERENCE, DIFFERENCE_WEIGHT = 0.7, 20.0


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The fitted parameters."""

    common: float
    difference: float
    offsets: tuple[float, ...]  # (K,)

    def apply(self, logits_NKH: Array) -> Array:
        """The same logits (N, K, H), the qualities' transformed."""
        mixed = logits_NKH.copy()
        mixed[:, :, QUALITY] = logits_NKH[:, :, QUALITY] @ self.matrix.T + np.array(self.offsets)
        return mixed

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(K, K), symmetric: z' = z @ matrix + offsets."""
        count = len(self.offsets)
        return self.difference * np.eye(count) + (self.common - self.difference) / count


def identity_transform(pools: int) -> LogitTransform:
    return LogitTransform(1.0, 1.0, (0.0,) * pools)


def fit_logit_transform(logits_NKH: Array, observed_NK: Array, weights: Array) -> LogitTransform:
    """Weighted maximum likelihood; labels that are NaN are left out.

    If any pool has too few labels the result is the identity, because pools are compared. A weak ridge (of one prompt;
    stronger for the difference) keeps the parameters finite where labels are separable.
    """
    count = observed_NK.shape[1]
    if count < 2 or not all(enough_labels(observed_NK[:, k], weights) for k in range(count)):
        return identity_transform(count)
    z = logits_NKH[:, :, QUALITY]
    mean = np.repeat(z.mean(1, keepdims=True), count, 1)
    pool = np.broadcast_to(np.eye(count), (len(z), count, count))
    design = np.concatenate([np.stack([mean, z - mean], 2), pool], 2).reshape(-1, count + 2)
    targets = observed_NK.reshape(-1)
    label_weights = np.repeat(weights / weights[weights > 0].mean(), count)
    seen = ~np.isnan(targets) & (label_weights > 0)
    design, targets, label_weights = design[seen], targets[seen], label_weights[seen]
    prior = np.array([1.0, DIFFERENCE, *[0.0] * count])
    ridge = np.array([1.0, DIFFERENCE_WEIGHT, *[1.0] * count])
    beta = fit_logistic(design, targets, label_weights, prior, ridge)
    common, difference = np.maximum(beta[:2], LEAST_SLOPE)
    return LogitTransform(float(common), float(difference), tuple(map(float, beta[2:])))


def fold_into_weights(model: Estimator, transform: LogitTransform) -> None:
    """Changes a model's weights in place so that both its stages give transformed logits."""
    matrix = torch.tensor(transform.matrix, dtype=torch.float32, device=model.device)
    offsets = torch.tensor(transform.offsets, dtype=torch.float32, device=model.device)
    config = model.config
    quality = slice(QUALITY, None, len(config.heads))  # of the outputs
    # outputs are the last dimension of each
    by_output: list[torch.Tensor] = [model.wide_weight, model.surface_weight] if config.wide else []
    by_output += [model.trunk.heads.weight.T, model.trunk.heads.bias] if config.trunk else [model.deep_weight]
    by_output += [model.similarity.weight] if config.centres else []
    by_output += [model.group_weight] if config.groups else []
    by_output += [model.bias] if config.wide or not config.trunk else []
    with torch.no_grad():
        for weight in by_output:
            weight[..., quality] = weight[..., quality] @ matrix
        by_output[-1][quality] += offsets  # the one bias, or the trunk's
