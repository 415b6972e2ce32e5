"""The paper's estimator and recipe: the trunk, one step with all its terms on a whole encoder, and going on exactly."""

import random
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depo_gateway.estimator import forward
from depo_gateway.estimator.learner import FAITHFUL, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, Trunk, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig

WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "question", "about", "number")


def faithful(
    encoder: Path, config: LearnerConfig = FAITHFUL, seed: int = 0, pools: tuple[str, ...] = ("policy",)
) -> Learner:
    made = ModelConfig(pools, TextConfig(max_tokens=32), str(encoder), 0, wide=False, trunk=True)
    return Learner(*create_model(made, rounded=False, seed=seed), config, seed)


def rollouts(count: int, seed: int = 0) -> list[Example]:
    """Prompts with one policy's mean reward and token confidence: it fails those with "hard"."""
    chance = random.Random(seed)
    examples = []
    for index in range(count):
        hard = index % 2 == 1
        text = " ".join([*chance.sample(WORDS, 4), "hard" if hard else "easy", chance.choice(WORDS)])
        examples.append(Example(text, {"policy": float(not hard)}, {"policy": 0.2 if hard else 0.9}))
    return examples


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
        for e, t, d in zip(rollouts(4), accuracy, confidence, strict=True)
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


def test_it_learns(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder, replace(FAITHFUL, encoder_learning_rate=2e-3))  # the encoder is a random one
    for number in range(30):
        made.step(rollouts(32, number))
    seen = rollouts(100, seed=99)
    z, u = made.score([example.prompt for example in seen])[:, 0].T
    hard = np.array([example.quality["policy"] == 0.0 for example in seen])
    assert z[hard].max() < z[~hard].min()
    assert u[hard].max() < u[~hard].min()


def test_every_tensor_of_encoder_and_trunk_moves_in_one_step_in_fp32(tiny_encoder: Path) -> None:
    made = faithful(tiny_encoder)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # as a trainer may have set
        terms = made.step(rollouts(32))
    assert terms == faithful(tiny_encoder).step(rollouts(32))
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
    for name in ("seed", "steps"):  # the masks of another seed, or of another step, are others
        one, other = faithful(tiny_encoder), faithful(tiny_encoder)
        setattr(other, name, 1)
        for each in (one, other):
            each.step(rollouts(16))
        assert not same(one.model.state_dict(), other.model.state_dict())
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
        return Learner(*create_model(made, rounded=False, seed=seed), config, seed)

    whole, first = fresh(), fresh()
    for made in (whole, first):
        steps(made, 4)
    state = first.state_dict()
    steps(first, 1)  # a snapshot stays what it was
    torch.save(state, tmp_path / "state.pt")
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
    model = ModelConfig(("a", "b"), TextConfig(max_tokens=32), str(tiny_encoder), 0)
    for made in (faithful(tiny_encoder), Learner(*create_model(model), LearnerConfig())):
        with torch.no_grad():
            for parameter in made.heads:
                parameter.normal_(std=0.1)
        for averaged, parameter in zip(made.average, made.heads, strict=False):
            averaged.copy_(parameter.detach())
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
        model, tokenizer = create_model(
            ModelConfig(("policy",), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide=False, trunk=trunk)
        )
        linear = Learner(model, tokenizer, LearnerConfig())
        before: Any = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        linear.fit_statistics(linear.items([Example("what is easy", {}), Example("what is hard", {})]))
        assert np.isfinite(linear.score(["what is the sum"])).all()
        assert same(before, model.state_dict()) is trunk
    linear.fit_statistics(linear.items(rollouts(3)))  # two of the three are easy
    assert linear.score(["what is the sum"])[0, 0, 0] == pytest.approx(log(2), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_learner_on_a_gpu_steps_and_scores_there_and_leaves_its_random_state_alone(tiny_encoder: Path) -> None:
    for wide in (True, False):
        config = ModelConfig(("policy",), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide, trunk=True)
        model, tokenizer = create_model(config, rounded=False)
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


def test_a_large_batch_keeps_less_and_learns_the_same(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(made: Learner) -> int:
        kept = 0

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made.step(rollouts(16))
        return kept

    plain, spared = faithful(tiny_encoder), faithful(tiny_encoder)
    kept = saved(plain)
    monkeypatch.setattr(forward, "MANY", 10)
    assert saved(spared) < kept
    for one, other in zip(plain.model.parameters(), spared.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
