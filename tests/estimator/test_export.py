"""A fine-tuned encoder survives being written: what it learned is not rounded away, nor forgotten the next time."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper

from depo_gateway.estimator import checkpoint, export, model
from depo_gateway.estimator.calibration import STAGES, Calibration
from depo_gateway.estimator.learner import FAITHFUL, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import TextConfig
from tests.stages import uncalibrated_stage

POOLS = ("small", "large")
STAGE = uncalibrated_stage(2)
CALIBRATED = Calibration(POOLS, dict.fromkeys(STAGES, STAGE), {})
TEXTS = [
    "what is easy",
    "what is hard",
    "prove the hard theorem",
    "hello thanks easy",
    "the sum of one two",
    "hard sum",
]
EXAMPLES = [Example(text, {"small": float("hard" not in text), "large": 1.0}) for text in TEXTS]


def taught(learner: Learner, steps: int = 4) -> Learner:
    for _ in range(steps):
        learner.step(EXAMPLES)
    return learner


@pytest.fixture(scope="module")
def tuned(tiny_encoder: Path) -> Learner:
    """A learner whose last layer took a few small steps, by heads as large as a fitted model's."""
    torch.manual_seed(0)
    built, tokenizer = create_model(ModelConfig(POOLS, TextConfig(max_tokens=32), str(tiny_encoder), 0))
    with torch.no_grad():
        built.deep_weight.normal_()
    learner = Learner(built, tokenizer, LearnerConfig(train_layers=1))
    learner.fit_statistics(learner.items(EXAMPLES))
    return taught(learner)


@pytest.fixture(scope="module")
def written(tuned: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tuned") / "first"
    with tuned.averaged() as fitted, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SMALL", 1024)  # or the tiny encoder's matrices would be too small for int8
        export.export_checkpoint(place, fitted, tuned.tokenizer, CALIBRATED, {}, tuned.trained)
    return place


def full_logits(learner: Learner) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return learner.predict(learner.items(EXAMPLES))[0].reshape(len(EXAMPLES), -1)


def served(place: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    runtime = Runtime.load(place)
    return runtime.full_logits([runtime.prepare(text) for text in TEXTS])


def test_what_was_trained_is_stored_as_it_is_and_the_rest_as_int8(tuned: Learner, written: Path) -> None:
    stored = safetensors.torch.load((written / checkpoint.WEIGHTS).read_bytes())
    live = tuned.model.state_dict()
    assert set(tuned.trained) == {name for name in stored if name.startswith("encoder.")}
    assert all(torch.equal(stored[name], live[name]) for name in tuned.trained)
    matrices = [numpy_helper.to_array(t) for t in onnx.load(written / checkpoint.ENCODER).graph.initializer]
    assert any(matrix.dtype == np.int8 for matrix in matrices)
    for name in tuned.trained:
        if live[name].dim() == 2:
            assert any(np.array_equal(matrix, live[name].T.numpy()) for matrix in matrices), name


def test_a_tuned_learner_is_served_as_it_predicts(tuned: Learner, written: Path) -> None:
    assert np.abs(full_logits(tuned) - served(written)).max() < 5e-4  # logits are up to 7


def test_export_leaves_the_model_as_it_was(tuned: Learner) -> None:
    before = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    modes = [module.train(number % 2 == 0).training for number, module in enumerate(tuned.model.children())]
    export.onnx_bytes(tuned.model)
    assert [module.training for module in tuned.model.children()] == modes
    tuned.model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.model.state_dict().items())


def test_a_frozen_learner_on_a_tuned_checkpoint_keeps_what_was_tuned(written: Path, tmp_path: Path) -> None:
    loaded, tokenizer, manifest = model.load_model(written)
    learner = taught(Learner(loaded, tokenizer, LearnerConfig()))
    assert learner.trained == ()
    with learner.averaged() as fitted:
        again = export.export_checkpoint(tmp_path / "again", fitted, tokenizer, CALIBRATED, {}, learner.trained)
    assert set(again.base.trained) == set(manifest.base.trained) != set()
    reloaded = Learner(*model.load_model(tmp_path / "again")[:2], LearnerConfig())
    for expected in (full_logits(learner), served(tmp_path / "again")):
        assert np.abs(full_logits(reloaded) - expected).max() < 5e-4


def test_one_odd_example_hardly_moves_a_loaded_learners_average(written: Path) -> None:
    learner = Learner(*model.load_model(written)[:2], LearnerConfig())
    before = learner.average[0].clone()
    learner.step([Example("what is easy", {"small": 0.0, "large": 0.0})])
    moved, live = (learner.average[0] - before).norm(), (learner.heads[0].detach() - before).norm()
    assert 0 < moved < 0.02 * live


def policy(encoder: Path, config: LearnerConfig, wide: bool, rounded: bool) -> Learner:
    """A learner of an RL run after a few steps, with logits as large as a fitted one's."""
    pools = ("policy", "spread")
    made = ModelConfig(pools, TextConfig(max_tokens=32), str(encoder), 0, wide=wide, trunk=True)
    torch.manual_seed(0)
    built, tokenizer = create_model(made, rounded=rounded)
    with torch.no_grad():
        built.trunk.heads.weight.normal_(std=0.1)
    learner = Learner(built, tokenizer, config)
    examples = [Example(e.prompt, {"policy": e.quality["small"], "spread": 1.0}) for e in EXAMPLES]
    learner.fit_statistics(learner.items(examples))
    for _ in range(3):
        learner.step(examples)
    return learner


@pytest.mark.parametrize(
    ("config", "wide", "rounded"),
    [
        (FAITHFUL, False, False),
        (LearnerConfig(dropout=True), False, True),
        (LearnerConfig(), True, True),
        (LearnerConfig(), False, False),  # frozen, yet not rounded
        (LearnerConfig(train_layers=1), True, False),
    ],
)
def test_a_policys_estimator_is_served_as_it_predicts_and_loads_to_the_bit(
    tiny_encoder: Path, tmp_path: Path, config: LearnerConfig, wide: bool, rounded: bool
) -> None:
    learner = policy(tiny_encoder, config, wide, rounded)
    expected = learner.score(TEXTS)[:, :1]
    stage = uncalibrated_stage(1)
    calibrated = Calibration(("policy",), dict.fromkeys(STAGES, stage), {})
    with learner.averaged() as fitted:
        part = model.select_pools(fitted, ("policy",))
        weights = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        export.export_checkpoint(tmp_path / "policy", part, learner.tokenizer, calibrated, {}, learner.trained)
    loaded, tokenizer, manifest = model.load_model(tmp_path / "policy")
    assert (manifest.base.wide, manifest.base.trunk, manifest.base.rounded) == (wide, True, rounded)
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert np.abs(Learner(loaded, tokenizer, config).score(TEXTS) - expected).max() < 1e-5  # one pool sums otherwise
    assert np.ptp(expected) > 0.3
    assert np.abs(expected.reshape(len(TEXTS), 2) - served(tmp_path / "policy")).max() < 1e-4
    stored = safetensors.torch.load((tmp_path / "policy" / checkpoint.WEIGHTS).read_bytes())
    assert ("idf" in stored) is wide
