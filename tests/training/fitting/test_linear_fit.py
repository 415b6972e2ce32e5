"""Linear heads solved to convergence: the optimum, folds that measure the served model, both forms of the design."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.fitting import linear_fit
from depo_gateway.training.fitting.linear_fit import Design, assign, columns_of, held_out_logits, solve
from tests.estimator.test_learner import chatter

FOLDS = np.arange(60) % 6


def prepared(encoder: Path, examples: list[Example], wide: bool = True) -> tuple[Learner, list[Item]]:
    model, tokenizer = create_model(ModelConfig(("small", "large"), TextConfig(max_tokens=32), str(encoder), 0, wide))
    learner = Learner(model, tokenizer, LearnerConfig())
    items = learner.items(examples)
    learner.fit_statistics(items)
    learner.settle()
    return learner, items


def labels_of(items: list[Item]) -> torch.Tensor:
    """Those of quality, (N, 2)."""
    return torch.tensor([item.quality for item in items], dtype=torch.float64)


def objective(design: Design, labels: torch.Tensor, penalty: float, weights: linear_fit.Weights) -> float:
    """The penalised loss of one model of two outputs, written anew."""
    full, cheap = design.logits(weights)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(full, labels, reduction="sum")
    if design.has_wide:
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(cheap, labels, reduction="sum")
    squares = sum((part**2).sum() for part in (weights.wide, weights.surface, weights.deep))
    mean = torch.logit((labels.sum(0) + 0.5) / (len(labels) + 1))
    away = ((weights.bias - mean) ** 2).sum()
    return float(loss + penalty / 2 * squares + linear_fit.BIAS_PENALTY / 2 * away)


@pytest.mark.parametrize("wide", [True, False])
def test_no_step_from_the_solution_lowers_the_loss(tiny_encoder: Path, wide: bool) -> None:
    learner, items = prepared(tiny_encoder, chatter(60), wide)
    design, labels = Design(learner.model, items), labels_of(items)
    solution = solve(design, columns_of(labels, torch.ones(60, dtype=torch.float64), []), 0.5)
    least = objective(design, labels, 0.5, solution)
    generator = torch.Generator().manual_seed(0)
    for size in (0.3, 0.01):
        parts = [p + size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in solution.parts()]
        assert objective(design, labels, 0.5, linear_fit.Weights(*parts)) > least


def test_the_compressed_design_gives_the_same_model(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, items = prepared(tiny_encoder, chatter(60))
    columns = columns_of(labels_of(items), torch.ones(60, dtype=torch.float64), [FOLDS])
    logits = []
    for most in (linear_fit.MOST_COMPRESSED, 0):
        monkeypatch.setattr(linear_fit, "MOST_COMPRESSED", most)
        design = Design(learner.model, items)
        logits.append(design.logits(solve(design, columns, 1.0))[0].numpy())
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-3)


def test_the_estimator_predicts_what_the_fit_does(tiny_encoder: Path) -> None:
    learner, items = prepared(tiny_encoder, chatter(60))
    design = Design(learner.model, items)
    weights = solve(design, columns_of(labels_of(items), torch.ones(60, dtype=torch.float64), []), 1.0)
    spread = design.zeros(4)  # of quality and token confidence; the latter has no labels here
    for to, of in zip(spread.parts(), weights.parts(), strict=True):
        to[:, [0, 2]] = of
    assign(learner.model, design, spread)
    for predicted, expected in zip(learner.predict(items), design.logits(weights), strict=True):
        np.testing.assert_allclose(predicted[:, :, 0], expected.numpy(), atol=1e-4)
        assert (predicted[:, :, 1] == 0).all()


def test_a_folds_model_has_not_seen_its_examples(tiny_encoder: Path) -> None:
    examples = chatter(60)
    turned = [
        Example(e.prompt, {"small": 1.0 - e.quality["small"], "large": 1.0}) if FOLDS[i] == 2 else e  # type: ignore[operator]
        for i, e in enumerate(examples)
    ]
    predictions = []
    for some in (examples, turned):
        learner, items = prepared(tiny_encoder, some)
        design = Design(learner.model, items)
        columns = columns_of(labels_of(items), torch.ones(60, dtype=torch.float64), [FOLDS])
        weights = solve(design, columns, 1.0)
        predictions.append(design.logits(weights)[0][:, 4:6].numpy())  # of the model of fold 2
    np.testing.assert_allclose(*predictions, atol=1e-6)


def test_without_anything_learned_the_folds_do_not_spread_the_scores(tiny_encoder: Path) -> None:
    learner, items = prepared(tiny_encoder, chatter(60))
    design = Design(learner.model, items)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (60, 2)).astype(float))
    weights = solve(design, columns_of(labels, torch.ones(60, dtype=torch.float64), [FOLDS]), 1e6)
    full, cheap = held_out_logits(design, weights, 0, [FOLDS], 2)
    assert np.ptp(full, axis=0).max() < 1e-3
    assert np.ptp(cheap, axis=0).max() < 1e-3


def test_labels_without_contrast_and_missing_labels_stay_finite(tiny_encoder: Path) -> None:
    learner, items = prepared(tiny_encoder, chatter(60))
    labels = torch.ones(60, 2, dtype=torch.float64)
    labels[5:, 1] = torch.nan
    design = Design(learner.model, items)
    full, _ = design.logits(solve(design, columns_of(labels, torch.ones(60, dtype=torch.float64), [FOLDS]), 0.125))
    assert torch.isfinite(full).all()
    assert (full > 0).all()


def test_groups_are_learned_and_the_same_weights_serve_prompts_without_one(tiny_encoder: Path) -> None:
    """Two tasks with equal prompts and opposite labels: without the group nothing is known, with it everything."""
    config = ModelConfig(("small", "large"), TextConfig(max_tokens=32), str(tiny_encoder), 0, groups=("easy", "hard"))
    model, tokenizer = create_model(config)
    learner = Learner(model, tokenizer, LearnerConfig())
    examples = [
        replace(example, quality={"small": float(task == "easy"), "large": 1.0}, task=task)
        for example in chatter(60)
        for task in ("easy", "hard")
    ]
    items = learner.items(examples)
    learner.fit_statistics(items)
    learner.settle()
    design = Design(model, items)
    weights = solve(design, columns_of(labels_of(items), torch.ones(120, dtype=torch.float64), []), 0.125)
    spread = design.zeros(4)
    for to, of in zip(spread.parts(), weights.parts(), strict=True):
        to[:, [0, 2]] = of
    assign(model, design, spread)
    np.testing.assert_allclose(learner.predict(items)[0][:, :, 0], design.logits(weights)[0].numpy(), atol=1e-4)
    small = learner.predict(items)[0][:, 0, 0]
    assert small[::2].min() > 0.5 > -0.5 > small[1::2].max()
    untold = learner.predict(learner.items([replace(example, task="") for example in examples]))[0][:, 0, 0]
    assert np.abs(untold).max() < 0.5
    full, _, told, _ = design.stages(weights)
    assert not torch.equal(full, told)
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(120, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    back = design.transposed(stages)
    both = sum(float((a * b).sum()) for a, b in zip(stages, design.stages(weights), strict=True))
    assert float(back.dot(weights).sum()) == pytest.approx(both)  # really the transpose
