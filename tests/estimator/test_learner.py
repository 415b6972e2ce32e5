"""One online update after another: it learns, masks, averages, and trains only what it is told to."""

import random
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from estimator.learner import FAITHFUL, Learner, LearnerConfig
from estimator.model import ModelConfig, collate, create
from estimator.records import Example
from estimator.text import TextConfig
from estimator.trunk import Trunk

POOLS = ("small", "large")
WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "question", "about", "number")


def learner(encoder: Path, config: LearnerConfig | None = None) -> Learner:
    built, tokenizer = create(ModelConfig(POOLS, TextConfig(max_tokens=32), str(encoder), 0))
    return Learner(built, tokenizer, config or LearnerConfig())


def chatter(count: int, seed: int = 0) -> list[Example]:
    """Prompts of which those with "hard" need the large pool, whose token confidence tells the same."""
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
    with pytest.raises(ValueError, match="train_layers is 3, but 2"):
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
    "name", ["train_layers", "ranking_weight", "gain_weight", "distillation_weight", "trunk_learning_rate", "average"]
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


def faithful(
    encoder: Path, config: LearnerConfig = FAITHFUL, seed: int = 0, pools: tuple[str, ...] = ("policy",)
) -> Learner:
    made = ModelConfig(pools, TextConfig(max_tokens=32), str(encoder), 0, wide=False, trunk=True)
    return Learner(*create(made, rounded=False, seed=seed), config, seed)


def rollouts(count: int, seed: int = 0) -> list[Example]:
    """The same prompts with the mean reward and the token confidence of one policy."""
    return [
        Example(e.prompt, {"policy": e.quality["small"]}, {"policy": e.token_confidence["small"]})
        for e in chatter(count, seed)
    ]


def test_an_untrained_trunk_says_about_a_half_and_the_same_from_the_same_seed(tiny_encoder: Path) -> None:
    prompts = [example.prompt for example in rollouts(40)]
    torch.manual_seed(1)
    first = faithful(tiny_encoder).score(prompts)
    torch.manual_seed(2)
    again, other = faithful(tiny_encoder).score(prompts), faithful(tiny_encoder, seed=1).score(prompts)
    assert first.shape == (40, 1, 2)
    assert np.abs(1 / (1 + np.exp(-first)) - 0.5).max() < 0.03
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    state = torch.get_rng_state()
    Trunk(32, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_trunk_is_the_papers() -> None:
    trunk = Trunk(768, 2)
    shapes = [tuple(p.shape) for n, p in trunk.named_parameters() if n.endswith("weight") and p.dim() == 2]
    assert shapes == [(1024, 768), *[(1024, 1024)] * 4, (512, 1024), (2, 512)]
    assert [type(m).__name__ for m in trunk.blocks[0]] == [  # type: ignore[union-attr]
        "Linear", "LayerNorm", "GELU", "Dropout", "Linear", "LayerNorm",
    ]  # fmt: skip
    assert [m.p for m in trunk.modules() if isinstance(m, torch.nn.Dropout)] == [0.1] * 3
    for module in trunk.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias.abs().max() == 0.0
            if module is not trunk.heads:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert trunk.heads.weight.std().item() == pytest.approx(0.001, rel=0.1)
    x = torch.randn(3, 768)
    by_hand = trunk.eval().enter(x)
    for block in trunk.blocks:
        by_hand = torch.nn.functional.gelu(by_hand + block(by_hand))
    assert torch.equal(trunk(x), trunk.heads(trunk.leave(by_hand)))


def test_the_papers_loss_is_the_sum_of_its_three_terms_worked_by_hand(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder, replace(FAITHFUL, dropout=False))
    accuracy, confidence = (1.0, 0.5, 0.0, 0.04), (0.9, 0.6, 0.2, 0.1)
    batch = [
        Example(e.prompt, {"policy": t}, {"policy": d})
        for e, t, d in zip(chatter(4), accuracy, confidence, strict=True)
    ]
    for _ in range(3):  # so that the logits differ
        made.step(batch)
    z, u = made.score([example.prompt for example in batch])[:, 0].T

    def bce(logit: float, target: float) -> float:
        return -target * log(1 / (1 + exp(-logit))) - (1 - target) * log(1 / (1 + exp(logit)))

    above = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]  # 0.04 is no more than 0.05 over 0
    terms = made.step(batch)
    assert terms["advantage"] == pytest.approx(sum(map(bce, z, accuracy)) / 4, rel=1e-4)
    assert terms["distillation"] == pytest.approx(0.5 * sum(map(bce, u, confidence)) / 4, rel=1e-4)
    assert terms["ranking"] == pytest.approx(3.0 * sum(max(0.0, 0.5 - (z[i] - z[j])) for i, j in above) / 5, rel=1e-4)
    half = faithful(tiny_encoder, replace(FAITHFUL, dropout=False, distillation_weight=0.5, ranking_weight=0.0))
    assert set(half.step(batch)) == {"advantage", "distillation"}
    assert set(faithful(tiny_encoder, replace(FAITHFUL, distillation_weight=0.0)).step(batch)) == {
        "advantage",
        "ranking",
    }


def test_every_tensor_of_encoder_and_trunk_moves_in_one_step_in_fp32(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # as a trainer may have set
        made.step(rollouts(32))
    (optimizer,) = made.optimizers
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([4e-5, 2e-4])
    rounded_away = []
    for name, parameter in made.model.named_parameters():
        rate = rates[name.startswith("trunk.")]
        moved = parameter.detach() - (1 - 0.01 * rate) * before[name]
        if "key.bias" not in name:  # a key's bias changes no softmax
            assert moved.abs().max() > 0.5 * rate, name
        if parameter.dim() == 2 and name.startswith("encoder."):
            in_bf16 = before[name].bfloat16() + moved.bfloat16()
            rounded_away.append((in_bf16 == before[name].bfloat16()).float().mean().item())
    assert np.mean(rounded_away) > 0.5  # in bf16 that same step would have left most of the matrices where they were


def test_the_whole_of_what_adam_trains_is_clipped_together(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder)
    with torch.no_grad():
        made.model.trunk.heads.weight.mul_(1e4)
    made.step(rollouts(32))
    norm = torch.stack([p.grad.norm() for p in made.model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)


def steps(made: Learner, count: int) -> dict[str, torch.Tensor]:
    for number in range(count):
        made.step(rollouts(16, seed=made.steps + number))
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_follows_from_the_seed_and_leaves_the_global_random_state_alone(tiny_encoder: Path) -> None:
    first = steps(faithful(tiny_encoder), 3)
    torch.manual_seed(5)
    made, state = faithful(tiny_encoder), torch.get_rng_state()
    again = steps(made, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert not made.model.training
    other = faithful(tiny_encoder)
    other.seed = 1
    assert not same(first, steps(other, 3))
    assert not same(first, steps(faithful(tiny_encoder, replace(FAITHFUL, dropout=False)), 3))


@pytest.mark.parametrize(
    ("config", "wide", "trunk"),
    [(FAITHFUL, False, True), (LearnerConfig(train_layers=1), True, False), (LearnerConfig(dropout=True), True, True)],
)
def test_a_learner_goes_on_where_its_state_was_taken(
    tiny_encoder: Path, tmp_path: Path, config: LearnerConfig, wide: bool, trunk: bool
) -> None:
    def fresh(seed: int = 0) -> Learner:
        made = ModelConfig(("policy",), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide, trunk)
        return Learner(*create(made, rounded=False, seed=seed), config, seed)

    whole, first = fresh(), fresh()
    for made in (whole, first):
        steps(made, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    steps(first, 1)  # a snapshot stays what it was
    resumed = fresh(seed=7)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(steps(whole, 3), steps(resumed, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole.average, resumed.average, strict=True))
    prompts = [example.prompt for example in rollouts(10)]
    assert np.array_equal(whole.score(prompts), resumed.score(prompts))


def test_a_state_of_other_settings_is_refused(tiny_encoder: Path) -> None:
    state = faithful(tiny_encoder).state_dict()
    for other in (
        faithful(tiny_encoder, replace(FAITHFUL, average=0.9)),
        faithful(tiny_encoder, replace(FAITHFUL, train_layers=1)),
        faithful(tiny_encoder, pools=("policy", "spread")),
    ):
        with pytest.raises(ValueError, match="saved state is one of other settings: it differs in"):
            other.load_state_dict(state)


def test_scores_are_those_of_each_prompt_alone_in_the_order_given(tiny_encoder: Path) -> None:
    prompts = [" ".join(["what", *["hard"] * (number * 7 % 23)]) for number in range(70)]
    for made in (faithful(tiny_encoder), taught(tiny_encoder, epochs=1)):
        together = made.score(prompts, batch_size=16)
        alone = np.concatenate([made.score([prompt]) for prompt in prompts])
        assert np.abs(together - alone).max() < 1e-4
        assert made.score([]).shape == (0, len(made.model.config.pools), 2)
        full, _ = made.predict(made.items([Example(prompt, {}) for prompt in prompts]))
        assert np.abs(together - full).max() < 1e-4


def test_without_a_wide_part_there_is_one_stage(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder)
    full, cheap = made.predict(made.items(rollouts(5)))
    assert np.array_equal(full, cheap)
    for trunk in (True, False):
        model, tokenizer = create(
            ModelConfig(POOLS, TextConfig(max_tokens=32), str(tiny_encoder), 0, wide=False, trunk=trunk)
        )
        linear = Learner(model, tokenizer, LearnerConfig())
        before: Any = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        linear.fit_statistics(linear.items([Example("what is easy", {}), Example("what is hard", {})]))
        assert np.isfinite(linear.score(["what is the sum"])).all()
        assert same(before, model.state_dict()) is trunk
    linear.fit_statistics(linear.items(chatter(50)))
    assert linear.score(["what is the sum"])[0, 0, 0] == pytest.approx(0.0, abs=1e-6)  # half of them are easy
    assert linear.score(["what is the sum"])[0, 1, 0] == pytest.approx(log(0.98 / 0.02), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_learner_on_a_gpu_steps_and_scores_there_and_leaves_its_random_state_alone(tiny_encoder: Path) -> None:
    for wide in (True, False):
        config = ModelConfig(("policy",), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide, trunk=True)
        model, tokenizer = create(config, rounded=False)
        made = Learner(model.cuda(), tokenizer, FAITHFUL)
        made.fit_statistics(made.items(rollouts(20)))
        state, on_cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
        first = made.step(rollouts(20))
        for _ in range(20):
            last = made.step(rollouts(20))
        assert last["advantage"] < first["advantage"]
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert torch.equal(torch.get_rng_state(), on_cpu)
        assert made.score(["what is hard"]).shape == (1, 1, 2)
