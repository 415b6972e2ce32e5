"""Embeddings across refreshes."""

from pathlib import Path

import numpy as np

from depo_gateway.estimator import model
from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.online.embedding_cache import EmbeddingCache


def test_embeddings_are_cached_by_encoder_and_the_oldest_are_evicted(tiny_checkpoint: Path) -> None:
    estimator, tokenizer, _ = model.load_model(tiny_checkpoint)
    learner = Learner(estimator, tokenizer, LearnerConfig())
    examples = [Example(f"what is {i}", {}) for i in range(8)]
    cache = EmbeddingCache(capacity=6)
    for cached, plain in zip(cache.items(learner, examples), learner.items(examples), strict=True):
        assert cached.embedding is not None
        assert plain.embedding is not None
        assert np.allclose(cached.embedding, plain.embedding, atol=1e-5)
    assert len(cache) == 6
