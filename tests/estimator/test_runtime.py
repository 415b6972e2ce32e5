"""What is served is what was trained: int8 ONNX against torch, on a two-layer BERT and on the real MiniLM."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator import calibration, checkpoint, export, model
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import TextConfig
from tests.estimator.poisoned import poisoned
from tests.stages import uncalibrated_stage

PROMPTS = [
    "what is the sum of one two three",
    "hard question: prove the theorem",
    "easy hello thanks",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?",
    "Which of these is NOT a mammal?\nA. a bat\nB. a whale\nC. a shark\nD. a mole\nAnswer:",
    "def f(x):\n    return [y ** 2 for y in x if y % 3]\n# what does f([1, 2, 3]) give?",
    "Let $f(x) = \\frac{x^2 - 1}{x + 1}$. Find $\\lim_{x \\to 1} f(x)$.",
    "hello",
    "the " * 300,
]


def torch_and_onnx(place: Path) -> tuple[Array, Array]:
    """Full-stage logits of PROMPTS by the checkpoint's torch model and by the runtime, (N, H) each."""
    loaded, tokenizer, _ = model.load_model(place)
    learner = Learner(loaded, tokenizer, LearnerConfig())
    items = learner.items([Example(prompt, {}) for prompt in PROMPTS])
    with torch.no_grad():
        expected, _ = learner._logits(items)
    runtime = Runtime.load(place)
    return expected.double().numpy(), runtime.full_logits([runtime.prepare(p) for p in PROMPTS]).astype(float)


def ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values)).astype(float)


def test_int8_onnx_agrees_with_torch(tiny_checkpoint: Path) -> None:
    expected, served = torch_and_onnx(tiny_checkpoint)
    assert np.abs(sigmoid(expected) - calibration.sigmoid(served)).max() < 1e-4


def test_int8_onnx_agrees_with_torch_on_minilm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built, tokenizer = create_model(ModelConfig(("small", "large"), TextConfig()))
    learner = Learner(built, tokenizer, LearnerConfig())
    learner.fit_statistics(learner.items([Example(prompt, {"small": 1.0, "large": 0.0}) for prompt in PROMPTS]))
    with torch.no_grad():
        built.deep_weight.normal_(std=1.5)  # logits spread as a fitted model's are
    stage = uncalibrated_stage(2)
    calibrated = Calibration(("small", "large"), {"full": stage, "cheap": stage}, {})
    export.export_checkpoint(tmp_path / "minilm", built, tokenizer, calibrated, {})
    assert sum(path.stat().st_size for path in (tmp_path / "minilm").iterdir()) < 25_000_000
    expected, served = torch_and_onnx(tmp_path / "minilm")
    difference = np.abs(sigmoid(expected) - calibration.sigmoid(served))
    assert np.ptp(expected) > 1.0
    assert difference.max() < 1e-3
    assert np.corrcoef(ranks(expected[:, 0]), ranks(served[:, 0]))[0, 1] > 0.999


def test_the_cheap_stage_agrees_with_torch(tiny_checkpoint: Path) -> None:
    loaded, tokenizer, _ = model.load_model(tiny_checkpoint)
    learner = Learner(loaded, tokenizer, LearnerConfig())
    with torch.no_grad():
        _, expected = learner._logits(learner.items([Example(prompt, {}) for prompt in PROMPTS]))
    assert expected is not None
    runtime = Runtime.load(tiny_checkpoint)
    assert runtime.has_cheap
    assert np.allclose(expected.numpy(), runtime.cheap_logits([runtime.prepare(p) for p in PROMPTS]), atol=1e-4)


def test_scores_are_probabilities_in_pool_order(tiny_checkpoint: Path) -> None:
    runtime = Runtime.load(tiny_checkpoint)
    assert runtime.pools == ("small", "large")
    assert runtime.version == runtime.manifest.version
    batch = [runtime.prepare("easy question about the number"), runtime.prepare("hard question about the number")]
    for scores in (runtime.score(batch), runtime.cheap(batch)):
        assert scores[0].quality[0] > scores[1].quality[0]
        for score in scores:
            assert len(score.quality) == len(score.token_confidence) == 2
            assert all(0.0 <= value <= 1.0 for value in score.quality + score.token_confidence)


def test_without_a_wide_part_there_is_no_cheap_stage(tiny_encoder: Path, tmp_path: Path) -> None:
    config = ModelConfig(("policy",), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide=False, trunk=True)
    built, tokenizer = create_model(config)
    stage = uncalibrated_stage(1)
    calibrated = Calibration(("policy",), {"full": stage, "cheap": stage}, {})
    export.export_checkpoint(tmp_path / "policy", built, tokenizer, calibrated, {})
    runtime = Runtime.load(tmp_path / "policy")
    prepared = [runtime.prepare(prompt) for prompt in PROMPTS]
    assert not runtime.has_cheap
    assert all(score.quality[0] == pytest.approx(0.5, abs=0.03) for score in runtime.score(prepared))
    with pytest.raises(ValueError, match="has no wide part, and therefore no cheap stage"):
        runtime.cheap(prepared)
    manifest, files = checkpoint.load_checkpoint(tmp_path / "policy")
    both = calibration.dumps(Calibration(("a", "b"), {"full": stage, "cheap": stage}, {}))
    place = tmp_path / "two"
    checkpoint.write_checkpoint(
        place, {**files, checkpoint.CALIBRATION: both}, manifest.base, ("a", "b"), manifest.text, {}
    )
    with pytest.raises(ValueError, match="disagree with the manifest about the pools"):
        Runtime.load(place)


def test_a_batch_scores_each_prompt_as_if_alone(tiny_checkpoint: Path) -> None:
    runtime = Runtime.load(tiny_checkpoint)
    prepared = [runtime.prepare(prompt) for prompt in PROMPTS]
    together = runtime.score(prepared)
    for one, score in zip(prepared, together, strict=True):
        assert runtime.score([one])[0].quality == pytest.approx(score.quality, abs=1e-4)


def test_threads_may_score_at_once(tiny_checkpoint: Path) -> None:
    runtime = Runtime.load(tiny_checkpoint)
    expected = [runtime.score([runtime.prepare(prompt)]) for prompt in PROMPTS]
    found: dict[int, bool] = {}

    def work(number: int) -> None:
        found[number] = all(
            runtime.score([runtime.prepare(prompt)]) == score for prompt, score in zip(PROMPTS, expected, strict=True)
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_files_that_are_whole_but_no_model_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest, files = checkpoint.load_checkpoint(tiny_checkpoint)
    for name in checkpoint.FILES:
        place = poisoned(tiny_checkpoint, tmp_path / name, name, lambda _: b"nonsense")
        with pytest.raises(ValueError, match="can't be used"):
            Runtime.load(place)
    place = tmp_path / "pools"
    checkpoint.write_checkpoint(place, files, manifest.base, ("other", "pools"), manifest.text, {})
    with pytest.raises(ValueError, match="disagree with the manifest about the pools"):
        Runtime.load(place)


def test_serving_needs_no_torch() -> None:
    code = "import sys, depo_gateway.estimator.runtime; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


def test_onnx_runtime_reports_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """From 1.29 on it writes a device id and events under HOME as soon as it starts, and sends them seconds later."""
    program = """
import sys
from pathlib import Path
from depo_gateway.estimator.runtime import Runtime
runtime = Runtime.load(Path(sys.argv[1]))
runtime.score([runtime.prepare("what is the hard sum")])
"""
    own = {name: value for name, value in os.environ.items() if name not in {"CI", "ORT_DISABLE_TELEMETRY"}}
    environment = {**own, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program, str(tiny_checkpoint)], env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
