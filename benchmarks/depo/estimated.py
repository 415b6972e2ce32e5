"""DEPO as a method of the benchmark: the trainer's own Selector over the estimator's own model and learner."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.depo.encoder import save_encoder
from benchmarks.depo.methods import RollOut
from depo_gateway.estimator.learner import FAITHFUL, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.selection_config import Choice, SelectionConfig
from depo_gateway.training.rl.selector import Selector

# A run here has some 400 steps of 16 labels where the paper's has 1,000 of 128, and the encoder starts from random
# weights: larger rates, the same for encoder and trunk. Chosen on the tuning seeds.
SMALL = replace(FAITHFUL, trunk_learning_rate=1e-3, encoder_learning_rate=1e-3)


@dataclass(frozen=True, slots=True)
class DepoConfig:
    selection: SelectionConfig
    learner: LearnerConfig = SMALL
    clip_high: float = 0.2
    dynamic: bool = False


class Depo:
    """Prompts as the Selector chooses them."""

    def __init__(self, prompts: Sequence[str], config: DepoConfig, seed: int) -> None:
        self.dynamic, self.clip_high = config.dynamic, config.clip_high
        with tempfile.TemporaryDirectory() as place:
            save_encoder(Path(place), seed=seed)
            model, tokenizer = create_model(
                ModelConfig(config.selection.pools, TextConfig(max_tokens=64), place, 0, wide=False, trunk=True),
                rounded=False,
                seed=seed,
            )
        self.learner = Learner(model, tokenizer, config.learner, seed)
        self.selector = Selector(prompts, config.selection, self.learner, seed)

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        pass

    def choose(self, need: int) -> Choice:
        return self.selector.choose(need)

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        return need

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        return self.selector.observe(groups)

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Predicted pass rates of prompts that may be of any data set."""
        return self.selector.beliefs.predicted(self.learner.score(prompts)[:, 0, 0])
