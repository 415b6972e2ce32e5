"""DEPO as a method of the benchmark: the trainer's Selector with the product's estimator and learner."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.depo.encoder import save_encoder
from benchmarks.depo.methods import Method
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import FAITHFUL, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.names import rule_of

# A run here has some 400 steps of 16 labels, the paper's 1,000 of 128, and the encoder starts from random weights.
# Hence larger learning rates, the same for encoder and trunk. Chosen on the tuning seeds.
SMALL = replace(FAITHFUL, trunk_learning_rate=1e-3, encoder_learning_rate=1e-3)


@dataclass(frozen=True, slots=True)
class DepoMethodConfig:
    selection: SelectionConfig
    learner: LearnerConfig = SMALL
    clip_high: float = 0.2
    dynamic: bool = False


class Depo(Method):
    """DEPO, with one of its two rules."""

    def __init__(self, prompts: Sequence[str], config: DepoMethodConfig, seed: int) -> None:
        heads = rule_of(config.selection).heads
        with tempfile.TemporaryDirectory() as place:
            save_encoder(Path(place), seed=seed)
            shape = ModelConfig(heads, TextConfig(max_tokens=64), place, 0, wide=False, trunk=True)
            model, tokenizer = create_model(shape, rounded=False, seed=seed)
        self.learner = Learner(model, tokenizer, config.learner, seed)
        super().__init__(Selector(prompts, config.selection, self.learner, seed), config.dynamic, config.clip_high)

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Predicted pass rates of prompts of any data set."""
        return self.selector.beliefs.predicted(self.learner.score(prompts)[:, 0, QUALITY])
