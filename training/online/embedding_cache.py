"""Cache of a frozen encoder's embeddings across refreshes, so that only new prompts are embedded."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from depo_gateway.estimator.learner import Item, Learner
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import prepare

CACHE_CAPACITY = 50_000  # embeddings: 160 MB for MiniLM, whose mean is kept too


class EmbeddingCache:
    """Embeddings by the token ids of a prompt and the encoder; the least recently used are evicted."""

    def __init__(self, capacity: int = CACHE_CAPACITY) -> None:
        self.capacity = capacity
        self._embeddings: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._embeddings)

    def items(self, learner: Learner, examples: Sequence[Example]) -> list[Item]:
        """The same as Learner.items, for a learner whose encoder is frozen."""
        assert not learner.trained, "the embeddings of an encoder that is trained can't be cached"
        encoder = encoder_fingerprint(learner)
        text = learner.model.config.text
        keys = []
        for example in examples:
            ids = prepare(learner.tokenizer, text, example.prompt, example.context).ids
            keys.append(hashlib.sha256(encoder + np.array(ids, np.int64).tobytes()).digest())
        missing = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._embeddings}
        fresh = learner.items(list(missing.values())) if missing else []
        known = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        for key, item in zip(missing, fresh, strict=True):
            assert item.embedding is not None
            known[key] = item.embedding
        for key in keys:
            self._embeddings[key] = known[key]
            self._embeddings.move_to_end(key)
        while len(self._embeddings) > self.capacity:
            self._embeddings.popitem(last=False)
        return learner.items(examples, embeddings=[known[key] for key in keys])


def encoder_fingerprint(learner: Learner) -> bytes:
    """A hash of an encoder and its tokenizer."""
    model = learner.model
    config = model.config
    identity = repr((config.encoder, config.layers, model.rounded, config.text, model.trained, config.centres > 0))
    digest = hashlib.sha256(identity.encode())
    digest.update(learner.tokenizer.to_str().encode())
    state = model.state_dict()
    for name in sorted(model.trained):  # all others are the base encoder's
        digest.update(state[name].cpu().numpy().tobytes())
    return digest.digest()
