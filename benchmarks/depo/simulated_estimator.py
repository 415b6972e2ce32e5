"""DEPO over MiniLM for the simulated policy: the product's Selector and Learner, with the encoder frozen.

A frozen encoder gives the same embedding of a question every time, so each is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.depo.catalog import DEPO as CATALOG
from benchmarks.depo.catalog import depo_of, parse
from benchmarks.depo.methods import Method
from depo_gateway.estimator.encoder import DEFAULT_ENCODER
from depo_gateway.estimator.heads import QUALITY, pool_labels
from depo_gateway.estimator.learner import FAITHFUL, Item, Learner
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.names import rule_of

Items = dict[str, Item]  # prompt -> item, embedded, without labels; shared by all runs
DEPO = ("depo", "depo-noranking", "depo-plus")
# Training the whole encoder, as in the paper, would take most of the benchmark's time.
LEARNER = replace(FAITHFUL, train_layers=0)
WARMUP = 10  # steps: short, so that much of the first pass, when only text distinguishes questions, is filtered


class CachingLearner(Learner):
    """A learner that tokenises and embeds each prompt once, while the encoder is frozen."""

    cache: Items

    def items(
        self, examples: Sequence[Example], batch_size: int = 64, embeddings: Sequence[Tensor] | None = None
    ) -> list[Item]:
        if self.trained:
            return super().items(examples, batch_size)
        new = [Example(prompt, {}) for prompt in {e.prompt: None for e in examples} if prompt not in self.cache]
        self.cache |= zip((example.prompt for example in new), super().items(new, batch_size), strict=True)
        pools, heads = self.model.config.pools, self.model.config.heads
        return [
            replace(
                self.cache[example.prompt],
                labels=tuple(pool_labels(example, head, pools) for head in heads),
                weight=example.weight,
            )
            for example in examples
        ]


class TextDepo(Method):
    """DEPO, with an estimator that reads the questions."""

    def __init__(self, selector: Selector, group_size: int) -> None:
        super().__init__(selector)
        self.group_size = group_size

    def judge(self, prompts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(pass rates, probabilities of a non-zero advantage) predicted for prompts that were never rolled out."""
        selector, learner = self.selector, self.selector.learner
        assert learner is not None
        logits = learner.score(prompts)[:, 0, QUALITY]
        rows = range(len(selector.prompts), len(selector.prompts) + len(prompts))
        worth = selector.beliefs.nonzero_advantage(rows, logits, self.group_size, selector.steps)
        return selector.beliefs.predicted(logits), worth


def text_depo(name: str, prompts: Sequence[str], seed: int, steps: int, group_size: int, items: Items) -> TextDepo:
    """A DEPO method by its name in the catalog. `steps`: those of GRPO."""
    kind, settings = parse(name)
    weights = replace(LEARNER, ranking_weight=CATALOG[kind].learner.ranking_weight)
    layers = int(settings.pop("layers", 5))
    settings.setdefault("warmup_steps", WARMUP)
    config = depo_of(replace(CATALOG[kind], learner=weights), settings, steps, group_size)
    model, tokenizer = create_model(
        ModelConfig(rule_of(config.selection).heads, TextConfig(), DEFAULT_ENCODER, layers, wide=False, trunk=True),
        rounded=False,
        seed=seed,
    )
    learner = CachingLearner(model, tokenizer, config.learner, seed)
    learner.cache = items
    return TextDepo(Selector(prompts, config.selection, learner, seed), group_size)


def embedded(prompts: Sequence[str], items: Items) -> NDArray[np.float64]:
    """Embeddings (N, D) of prompts by the encoder of the DEPO methods."""
    learner = text_depo("depo", prompts, 0, 1, 8, items).selector.learner
    assert learner is not None
    made = learner.items([Example(prompt, {}) for prompt in prompts])
    return np.array([item.embedding.double().numpy() for item in made if item.embedding is not None])
