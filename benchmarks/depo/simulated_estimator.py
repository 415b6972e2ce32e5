"""DEPO over MiniLM for the simulated policy: the product's Selector and Learner, with the encoder frozen.

A frozen encoder gives the same embedding of a question every time, so each is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.depo.catalog import DEPO as CATALOG
from benchmarks.depo.catalog import depo_of, parse
from benchmarks.depo.methods import RollOut
from depo_gateway.estimator.learner import FAITHFUL, Item, Learner
from depo_gateway.estimator.model import DEFAULT_ENCODER, ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.selection_config import Choice
from depo_gateway.training.rl.selector import Selector

Items = dict[str, Item]  # prompt -> it, embedded, without labels; runs share them
DEPO = ("depo", "depo-noranking", "depo-plus")
# The encoder whole, as in the paper, would take most of the benchmark's time; its learning rate is without effect.
LEARNER = replace(FAITHFUL, train_layers=0)
WARMUP = 10  # steps: of the questions' first pass, in which nothing but their text tells them apart, much is left


class Remembering(Learner):
    """A learner that tokenises and embeds each prompt once, while the encoder is frozen."""

    remembered: Items

    def items(
        self, examples: Sequence[Example], batch_size: int = 64, embeddings: Sequence[Tensor] | None = None
    ) -> list[Item]:
        if self.trained:
            return super().items(examples, batch_size)
        new = [Example(prompt, {}) for prompt in {e.prompt: None for e in examples} if prompt not in self.remembered]
        self.remembered |= zip((example.prompt for example in new), super().items(new, batch_size), strict=True)
        return [
            replace(
                self.remembered[example.prompt],
                quality=self.labels(example.quality),
                token_confidence=self.labels(example.token_confidence),
                weight=example.weight,
            )
            for example in examples
        ]

    def labels(self, known: Mapping[str, float | None]) -> tuple[float, ...]:
        """A label a pool, NaN where there is none."""
        found = [known.get(pool) for pool in self.model.config.pools]
        return tuple(float("nan") if label is None else label for label in found)


class TextDepo:
    """Prompts as the Selector chooses them."""

    dynamic = False
    clip_high = 0.2  # nothing is clipped here: no policy is trained

    def __init__(self, selector: Selector, group_size: int) -> None:
        self.selector, self.group_size = selector, group_size

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        pass

    def choose(self, need: int) -> Choice:
        return self.selector.choose(need)

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        return need

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        return self.selector.observe(groups)

    def judge(self, prompts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(pass rates, probabilities of a non-zero advantage) predicted for prompts that were never rolled out."""
        selector, learner = self.selector, self.selector.learner
        assert learner is not None
        logits = learner.score(prompts)[:, 0, 0]
        rows = range(len(selector.prompts), len(selector.prompts) + len(prompts))
        worth = selector.beliefs.nonzero_advantage(rows, logits, self.group_size, selector.steps)
        return selector.beliefs.predicted(logits), worth


def text_depo(name: str, prompts: Sequence[str], seed: int, steps: int, group_size: int, items: Items) -> TextDepo:
    """A DEPO method by its name in the catalog, `steps` long if it were GRPO."""
    kind, settings = parse(name)
    weights = replace(LEARNER, ranking_weight=CATALOG[kind].learner.ranking_weight)
    layers = int(settings.pop("layers", 5))
    settings.setdefault("warmup_steps", WARMUP)
    config = depo_of(replace(CATALOG[kind], learner=weights), settings, steps, group_size)
    model, tokenizer = create_model(
        ModelConfig(config.selection.pools, TextConfig(), DEFAULT_ENCODER, layers, wide=False, trunk=True),
        rounded=False,
        seed=seed,
    )
    learner = Remembering(model, tokenizer, config.learner, seed)
    learner.remembered = items
    return TextDepo(Selector(prompts, config.selection, learner, seed), group_size)


def embedded(prompts: Sequence[str], items: Items) -> NDArray[np.float64]:
    """Embeddings (N, D) of prompts by the encoder that the DEPO methods have."""
    learner = text_depo("depo", prompts, 0, 1, 8, items).selector.learner
    assert learner is not None
    made = learner.items([Example(prompt, {}) for prompt in prompts])
    return np.array([item.embedding.double().numpy() for item in made if item.embedding is not None])
