"""One online update after another: it learns, masks, averages, and trains only the configured layers."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, collate, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig

POOLS = ("small", "large")
WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "question", "about", "number")


def learner(encoder: Path, config: LearnerConfig | None = None) -> Learner:
    built, tokenizer = create_model(ModelConfig(POOLS, TextConfig(max_tokens=32), str(encoder), 0))
    return Learner(built, tokenizer, config or LearnerConfig())


def chatter(count: int, seed: int = 0) -> list[Example]:
    """Prompts of which those with "hard" need the large pool, as their token confidence says, too."""
    chance = random.Random(seed)
    examples = []
    for index in range(count):
        hard = index % 2 == 1
        text = " ".join([*chance.sample(WORDS, 4), "hard" if hard else "easy", chance.choice(WORDS)])
        examples.append(Example(text, {"small": 0.0 if hard else 1.0, "large": 1.0}, {"small": 0.2 if hard else 0.9}))
    return examples


def taught(encoder: Path, config: LearnerConfig | None = None, epochs: int = 12) -> Learner:
    made = learner(encoder, config)
    items = made.items(chatter(200))
    made.fit_statistics(items)
    for _ in range(epochs):
        for start in range(0, len(items), 25):
            made.step_items(items[start : start + 25])
    return made


def test_it_learns_both_heads_and_both_stages(tiny_encoder: Path) -> None:
    made = taught(tiny_encoder)
    fresh = chatter(100, seed=1)
    hard = np.array([example.quality["small"] == 0.0 for example in fresh])
    for logits in made.predict(made.items(fresh)):
        assert logits.shape == (100, 2, 2)
        assert logits[hard, 0, 0].max() < logits[~hard, 0, 0].min()  # the small pool's quality
        assert logits[hard, 0, 1].max() < logits[~hard, 0, 1].min()  # its token confidence
        assert (logits[:, 1, 0] > 0).all()  # the large pool is always right


def test_a_step_takes_examples_as_they_come(tiny_encoder: Path) -> None:
    made = learner(tiny_encoder, LearnerConfig(ranking_weight=1.0, gain_weight=1.0))
    made.fit_statistics(made.items(chatter(50)))
    first = made.step(chatter(50))
    assert set(first) == {"advantage", "distillation", "ranking", "gain"}
    for _ in range(20):
        last = made.step(chatter(50))
    assert last["advantage"] < first["advantage"]
    assert last["ranking"] < first["ranking"]


def test_missing_labels_move_nothing(tiny_encoder: Path) -> None:
    made = learner(tiny_encoder)
    blind = [replace(example, quality={"small": example.quality["small"]}) for example in chatter(50)]
    made.fit_statistics(made.items(blind))
    before = made.model.wide_weight.detach().clone()
    made.step(blind)
    moved = (made.model.wide_weight.detach() - before).abs().sum(0)
    assert moved[0] > 0
    assert moved[1] > 0
    assert moved[2:].tolist() == [0.0, 0.0]  # the large pool has neither label


def test_a_weight_of_zero_is_no_example_at_all(tiny_encoder: Path) -> None:
    wrong = [Example("what is easy", {"small": 0.0, "large": 0.0}, weight=0.0)]
    plain, weighted = learner(tiny_encoder), learner(tiny_encoder)
    for made, batch in ((plain, chatter(20)), (weighted, chatter(20) + wrong)):
        made.fit_statistics(made.items(chatter(20)))
        made.step(batch)
    assert torch.allclose(plain.model.wide_weight, weighted.model.wide_weight, atol=1e-7)


def test_the_average_is_what_predicts_and_the_live_weights_come_back(tiny_encoder: Path) -> None:
    made = taught(tiny_encoder, epochs=1)
    live = made.model.wide_weight.detach().clone()
    with made.averaged() as model:
        assert not torch.equal(model.wide_weight, live)
    assert torch.equal(made.model.wide_weight, live)


def test_a_frozen_encoder_stays_and_a_trained_layer_moves(tiny_encoder: Path) -> None:
    frozen, trained = taught(tiny_encoder, epochs=1), taught(tiny_encoder, LearnerConfig(train_layers=1), epochs=1)
    start = dict(learner(tiny_encoder).model.named_parameters())
    for name, parameter in frozen.model.named_parameters():
        assert not name.startswith("encoder.") or torch.equal(parameter, start[name])
    moved = {
        n for n, p in trained.model.named_parameters() if n.startswith("encoder.") and not torch.equal(p, start[n])
    }
    assert moved <= set(trained.trained)
    assert any(".layer.1." in name for name in moved)
    assert all(".layer.0." not in name for name in moved)
    with pytest.raises(ValueError, match="train_layers is 3, but the model has 2"):
        learner(tiny_encoder, LearnerConfig(train_layers=3))


def test_a_trained_layer_moves_by_its_gradient_and_not_by_weight_decay_alone(tiny_encoder: Path) -> None:
    config = LearnerConfig(train_layers=1)
    start = {name: p.detach().clone() for name, p in learner(tiny_encoder).model.named_parameters()}
    made = taught(tiny_encoder, config, epochs=1)
    encoder = made.optimizers[1].param_groups[0]
    shrunk = (1 - encoder["lr"] * encoder["weight_decay"]) ** made.steps
    for name, parameter in made.model.named_parameters():
        if name in made.trained and "key.bias" not in name:  # a key's bias changes no softmax
            assert (parameter.detach() - shrunk * start[name]).abs().max() > 0.5 * encoder["lr"], name


def test_known_embeddings_hold_nothing_else_in_memory(tiny_encoder: Path) -> None:
    made = learner(tiny_encoder)
    for item in made.items(chatter(8)):
        assert item.embedding is not None
        assert item.embedding.untyped_storage().nbytes() == item.embedding.nbytes
    ids, mask = collate([item.prepared for item in made.items(chatter(8))])
    with torch.no_grad():
        pooled = made.model.embed(ids, mask)
    assert pooled.untyped_storage().nbytes() == pooled.nbytes


def test_a_term_of_no_weight_is_not_computed(tiny_encoder: Path) -> None:
    assert set(learner(tiny_encoder).step(chatter(10))) == {"advantage", "distillation"}


@pytest.mark.parametrize(
    "name",
    [
        "train_layers",
        "ranking_weight",
        "gain_weight",
        "distillation_weight",
        "trunk_learning_rate",
        "weight_decay",
        "average",
    ],
)
def test_a_setting_below_0_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -2; it must be (at least )?0"):
        LearnerConfig(**{name: -2})
    with pytest.raises(ValueError, match=f"{name} is nan"):
        LearnerConfig(**{name: float("nan")})


def test_a_label_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="quality of pool 'small' is 1\\.5"):
        Example("x", {"small": 1.5})
    with pytest.raises(ValueError, match="weight is -1"):
        Example("x", {"small": 1.0}, weight=-1.0)
