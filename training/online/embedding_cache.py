"""Embeddings of a frozen encoder, kept between refreshes, so that only new prompts are embedded."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from depo_gateway.estimator.learner import Item, Learner
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import prepare

CAPACITY = 50_000  # embeddings; of MiniLM 80 MB


class EmbeddingCache:
    """By the token ids of a prompt and the encoder; the ones used longest ago make room."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def items(self, learner: Learner, examples: Sequence[Example]) -> list[Item]:
        """What Learner.items gives, for a learner whose encoder is frozen."""
        assert not learner.trained, "an encoder that learns has no embedding to keep"
        encoder = fingerprint(learner)
        text = learner.model.config.text
        keys = []
        for example in examples:
            ids = prepare(learner.tokenizer, text, example.prompt, example.context).ids
            keys.append(hashlib.sha256(encoder + np.array(ids, np.int64).tobytes()).digest())
        missing = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._kept}
        fresh = learner.items(list(missing.values())) if missing else []
        known = {key: self._kept[key] for key in keys if key in self._kept}
        for key, item in zip(missing, fresh, strict=True):
            assert item.embedding is not None
            known[key] = item.embedding
        for key in keys:
            self._kept[key] = known[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return learner.items(examples, embeddings=[known[key] for key in keys])


def fingerprint(learner: Learner) -> bytes:
    """Tells one encoder with its tokenizer from another."""
    model = learner.model
    config = model.config
    told = repr((config.encoder, config.layers, model.rounded, config.text, model.trained))
    digest = hashlib.sha256(told.encode())
    digest.update(learner.tokenizer.to_str().encode())
    state = model.state_dict()
    for name in sorted(model.trained):  # the others are the base encoder's own
        digest.update(state[name].cpu().numpy().tobytes())
    return digest.digest()
