"""Similarity to fitted prompts: clusters, distances in units of each cluster's spread, and what is served of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator import checkpoint, export, model
from depo_gateway.estimator.calibration import Calibration, Familiarity
from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model, expanded, select_pools
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.similarity import FEWEST_PROMPTS, Similarity, held_out_distances, usual_centres
from depo_gateway.estimator.text import TextConfig
from tests.estimator.test_learner import chatter
from tests.stages import uncalibrated_stage

POOLS = ("small", "large")


def blobs(count: int, spreads: tuple[float, ...], width: int = 16) -> torch.Tensor:
    """States around as many directions as there are spreads, `count` of each."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(width)[: len(spreads)]
    noise = torch.randn(len(spreads), count, width, generator=generator)
    return (directions[:, None] + torch.tensor(spreads)[:, None, None] * noise).flatten(0, 1)


def test_centres_are_the_clusters_of_the_prompts() -> None:
    states = blobs(50, (0.02, 0.02, 0.02))
    placed = Similarity(12, 16, 2)
    placed.place(states)
    owners = [set(part.tolist()) for part in placed.cosines(states).argmax(1).view(3, 50)]
    assert sum(map(len, owners)) == len(set.union(*owners))


def test_a_distance_is_measured_in_units_of_the_cluster_s_own_spread() -> None:
    """Two kinds of text, one of which the encoder puts close together: the same step away from it is farther."""
    states = blobs(200, (0.01, 0.2))
    placed = Similarity(2, 16, 2)
    placed.place(states)
    generator = torch.Generator().manual_seed(1)
    moved = blobs(200, (0.01, 0.2)) + 0.15 * torch.randn(400, 16, generator=generator)
    tight, loose = placed.distances(placed.cosines(moved)).view(2, 200).mean(1).tolist()
    assert tight > 3 * loose


def test_with_few_prompts_only_distances_are_used() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, features in ((FEWEST_PROMPTS - 1, False), (FEWEST_PROMPTS, True)):
        placed = Similarity(10, 16, 2)
        states = torch.randn(count, 16, generator=generator)
        placed.place(states)
        squared = placed.features(placed.cosines(states)).pow(2).sum(1).mean()
        assert float(squared) == pytest.approx(1.0 if features else 0.0, abs=1e-4)
        assert float(placed.distances(placed.cosines(states)).mean()) == pytest.approx(1.0, abs=0.3)


def test_fewer_prompts_than_centres_are_no_error() -> None:
    placed = Similarity(40, 16, 2)
    placed.place(blobs(5, (0.1, 0.1)))
    assert torch.isfinite(placed.distances(placed.cosines(blobs(5, (0.1, 0.1))))).all()


def test_held_out_distances_tell_kinds_that_were_fitted_from_others() -> None:
    states = blobs(300, (0.05, 0.05, 0.05))
    ordinary = held_out_distances(states, 6)
    placed = Similarity(6, 16, 0)
    placed.place(states)
    strange = placed.distances(placed.cosines(torch.eye(16)[8:9].repeat(10, 1)))
    assert float(torch.quantile(ordinary, 0.99)) < float(strange.min())


def test_the_number_of_centres() -> None:
    assert [usual_centres(count) for count in (2, 300, 9000)] == [0, 100, 1000]


def fitted(encoder: Path, groups: tuple[str, ...] = ()) -> Learner:
    """A model with random weights on centres of 60 prompts, and its groups."""
    config = ModelConfig(POOLS, TextConfig(max_tokens=32), str(encoder), 0, groups=groups, centres=8)
    built, tokenizer = create_model(config)
    learner = Learner(built, tokenizer, LearnerConfig(average=0.0))
    learner.fit_statistics(learner.items(chatter(60)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        built.similarity.unit.fill_(1.0)
        for name, parameter in built.named_parameters():
            if not name.startswith("encoder."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return learner


def exported(learner: Learner, place: Path, familiarity: Familiarity | None = None) -> Runtime:
    stage = uncalibrated_stage(2)
    calibrated = Calibration(POOLS, {"full": stage, "cheap": stage}, {}, {}, familiarity)
    export.export_checkpoint(place, learner.model, learner.tokenizer, calibrated, {})
    return Runtime.load(place)


def test_the_runtime_serves_similarities_and_groups(tiny_encoder: Path, tmp_path: Path) -> None:
    learner = fitted(tiny_encoder, ("law", "mathematics"))
    with torch.no_grad():
        learner.model.bias.zero_()
    runtime = exported(learner, tmp_path / "a")
    told = [Example(e.prompt, {}, task=("law", "mathematics", "unknown")[i % 3]) for i, e in enumerate(chatter(9))]
    prepared = [runtime.prepare(e.prompt, group=e.task) for e in told]
    full, cheap = learner.predict(learner.items(told))
    np.testing.assert_allclose(runtime.full_logits(prepared), full.reshape(9, -1), atol=1e-3)
    np.testing.assert_allclose(runtime.cheap_logits(prepared), cheap.reshape(9, -1), atol=1e-3)
    untold = runtime.full_logits([runtime.prepare(e.prompt) for e in told])
    assert (np.abs(untold - full.reshape(9, -1)).max(1) > 0.01).tolist() == [True, True, False] * 3


def test_an_unfamiliar_prompt_gets_the_pools_means(tiny_encoder: Path, tmp_path: Path) -> None:
    learner = fitted(tiny_encoder)
    prompts = [e.prompt for e in chatter(12)]
    distances = learner.distances(learner.items([Example(prompt, {}) for prompt in prompts]))
    assert distances is not None
    far = float(np.median(distances))
    runtime = exported(learner, tmp_path / "a", Familiarity(far - 0.01, far, (0.3, 0.8)))
    plain = exported(learner, tmp_path / "b")
    scores = runtime.score([runtime.prepare(prompt) for prompt in prompts])
    assert [one.unfamiliar for one in scores] == (distances > far).tolist()
    for one, other, distance in zip(scores, plain.score([plain.prepare(p) for p in prompts]), distances, strict=True):
        assert not other.unfamiliar
        if distance > far:
            assert one.quality == pytest.approx((0.3, 0.8), abs=1e-4)
        elif distance < far - 0.01:
            assert one.quality == pytest.approx(other.quality, abs=1e-5)
    assert not any(one.unfamiliar for one in runtime.cheap([runtime.prepare(p) for p in prompts]))


def test_a_saved_model_is_loaded_with_all_of_it(tiny_encoder: Path, tmp_path: Path) -> None:
    learner = fitted(tiny_encoder, ("law",))
    exported(learner, tmp_path / "a")
    loaded, _, manifest = model.load_model(tmp_path / "a")
    assert (manifest.base.groups, manifest.base.centres) == (("law",), 8)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_what_an_earlier_version_would_serve_wrongly_has_a_schema_that_it_refuses(
    tiny_encoder: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    exported(fitted(tiny_encoder), tmp_path / "a")
    assert checkpoint.load_manifest(tmp_path / "a").schema == 2
    assert checkpoint.load_manifest(tiny_checkpoint).schema == 1


def test_selected_pools_keep_their_similarities_and_groups(tiny_encoder: Path) -> None:
    learner = fitted(tiny_encoder, ("law",))
    turned = select_pools(learner.model, ("large", "small"))
    examples = [Example(e.prompt, {}, task="law") for e in chatter(5)]
    items = learner.items(examples)
    expected = learner.predict(items)[0]
    found = Learner(turned, learner.tokenizer, LearnerConfig(average=0.0)).predict(items)[0]
    np.testing.assert_allclose(found, expected[:, ::-1], atol=1e-5)


@pytest.mark.parametrize("added", [4, 1996])
def test_an_expanded_model_predicts_the_same_until_its_centres_are_filled(tiny_encoder: Path, added: int) -> None:
    learner = fitted(tiny_encoder, ("law",))
    grown = expanded(learner.model, ("law", "medicine"), added)
    assert grown.config.centres == min(8 + added, 2000)
    assert grown.config.groups == ("law", "medicine")
    other = Learner(grown, learner.tokenizer, LearnerConfig(average=0.0))
    examples = [Example(e.prompt, {}, task="law") for e in chatter(30)]
    items = other.items(examples)
    if added == 4:
        np.testing.assert_allclose(other.predict(items)[0], learner.predict(items)[0], atol=1e-5)
        np.testing.assert_allclose(other.distances(items), learner.distances(items), atol=1e-5)
    states = torch.stack([item.embedding for item in items if item.embedding is not None])[:, grown.width :]
    before = other.distances(items)
    grown.similarity.fill(states, added)
    after = other.distances(items)
    assert before is not None
    assert after is not None
    assert after.mean() < before.mean()
