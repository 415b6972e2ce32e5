"""n-grams and their weights, and that numpy and torch agree on the wide part."""

import numpy as np
import pytest

from depo_gateway.estimator import wide


def test_ngrams_count_tokens_and_hashed_pairs() -> None:
    indices, counts = wide.ngrams([5, 7, 5, 7], 10)
    found = dict(zip(indices.tolist(), counts.tolist(), strict=True))
    pairs = [index for index in found if index >= 10]
    assert found[5] == found[7] == pytest.approx(1 + np.log(2))
    assert len(pairs) == 2  # (5, 7) twice and (7, 5) once: order matters
    assert sorted(found[p] for p in pairs) == pytest.approx([1.0, 1 + np.log(2)])
    assert max(pairs) < 10 + wide.BUCKETS


def test_the_hash_is_the_same_for_ever() -> None:
    indices, _ = wide.ngrams([101, 2054, 2003, 102], 30522)
    assert indices.tolist() == PINNED


PINNED = [101, 102, 2003, 2054, 35096, 38992, 88884]


def test_values_have_unit_length_and_rare_tokens_weigh_more() -> None:
    idf = wide.fit_idf([[1, 2], [1, 3], [1, 4]], 5)
    assert idf[1] < idf[2] == idf[0]  # one never seen weighs no more than one seen once
    indices, values = wide.tf_idf([1, 2], idf)
    assert float(values @ values) == pytest.approx(1.0)
    by_index = dict(zip(indices.tolist(), values.tolist(), strict=True))
    assert by_index[1] < by_index[2]


def test_a_single_token_and_none_at_all() -> None:
    assert wide.ngrams([3], 5)[0].tolist() == [3]
    indices, values = wide.tf_idf([], np.ones(5 + wide.BUCKETS, np.float32))
    assert len(indices) == len(values) == 0


def test_standardise_clips_what_is_unlike_anything_seen() -> None:
    scaled = wide.standardise(np.array([[1e9, 2.0, 7.0]], np.float32), np.zeros(3), np.array([1.0, 1.0, 0.0]))
    assert scaled[0].tolist() == pytest.approx([wide.CLIP * wide.SURFACE_SCALE, 2 * wide.SURFACE_SCALE, 0.0])
