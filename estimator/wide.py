"""The wide part in numpy: weighted token n-grams and surface features -> logits. The cheap stage.

Shapes: T tokens, F features of one prompt, V unigrams (the tokenizer's ids) then BUCKETS hashed bigrams, S surface
features, O outputs (a logit for every head of every pool, pool by pool).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKETS = 2**16
SURFACE_SCALE = 0.1  # of a standardised feature: together they have about half of the n-grams' unit length
CLIP = 4.0  # standard deviations: no single feature of an unusual prompt may dominate


@dataclass(frozen=True, slots=True)
class Wide:
    """Weights of the wide part. `idf` weighs features by rarity; `weight` is (V + BUCKETS, O)."""

    idf: NDArray[np.float32]
    weight: NDArray[np.float32]
    surface_mean: NDArray[np.float32]
    surface_scale: NDArray[np.float32]  # 1 / standard deviation; 0 for a constant feature
    surface_weight: NDArray[np.float32]
    bias: NDArray[np.float32]


def ngrams(ids: Sequence[int], vocabulary: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The n-grams of T token ids, and 1 + log of how often each occurs: (indices_F, counts_F)."""
    tokens = np.asarray(ids, np.uint64)
    # multiplicative hashing (Knuth): the same in every process, unlike Python's hash()
    mixed = (tokens[:-1] * np.uint64(0x9E3779B1) + tokens[1:]) * np.uint64(0x85EBCA6B) >> np.uint64(13)
    pairs = mixed % np.uint64(BUCKETS) + np.uint64(vocabulary)
    indices, counts = np.unique(np.concatenate([tokens, pairs]).astype(np.int64), return_counts=True)
    return indices, (1.0 + np.log(counts)).astype(np.float32)


def tf_idf(ids: Sequence[int], idf: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """n-grams with tf-idf weights of unit length: (indices_F, values_F)."""
    indices, values = ngrams(ids, len(idf) - BUCKETS)
    values = values * idf[indices]
    return indices, values / max(float(np.sqrt(values @ values)), 1e-9)


def fit_idf(token_ids: Sequence[Sequence[int]], vocabulary: int) -> NDArray[np.float32]:
    """Smoothed inverse document frequency over the prompts given: (V + BUCKETS,)."""
    frequency = np.zeros(vocabulary + BUCKETS, np.int64)
    for ids in token_ids:
        frequency[ngrams(ids, vocabulary)[0]] += 1
    return (np.log((1 + len(token_ids)) / (1 + frequency.clip(min=1))) + 1).astype(np.float32)


def standardise(
    surface: NDArray[np.float32], mean: NDArray[np.float32], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(..., S) -> (..., S) with mean 0 and deviation SURFACE_SCALE over the fitting prompts, clipped."""
    scaled: NDArray[np.float32] = SURFACE_SCALE * np.clip((surface - mean) * scale, -CLIP, CLIP)
    return scaled


def wide_logits(wide: Wide, ids: Sequence[int], surface: Sequence[float]) -> NDArray[np.float32]:
    """One prompt -> (O,)."""
    indices, values = tf_idf(ids, wide.idf)
    seen = standardise(np.asarray(surface, np.float32), wide.surface_mean, wide.surface_scale)
    result: NDArray[np.float32] = values @ wide.weight[indices] + seen @ wide.surface_weight + wide.bias
    return result
