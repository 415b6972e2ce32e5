"""The wheel with the extra `training`, as docker/install leaves it, beside a user's packages of our folders' names."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import depo_gateway
from tests.container import Image
from tests.training.commands.test_fit import write_table
from tests.training.commands.test_rl import REWARDS, TINY
from tests.training.rl import policy

pytestmark = pytest.mark.slow
# a program of a user's; with what it does wrong, at the lines that say so
RIGHT = """
from collections.abc import Sequence
from depo_gateway import NAMES

config: DepoConfig = DepoConfig(output_dir="out", depo="plus")
method: str = config.depo


def trained(policy: str, prompts: Sequence[str]) -> DepoTrainer:
    return DepoTrainer(model=policy, reward_funcs=[], args=config, train_dataset=prompts)


def qualities(runtime: Runtime, prompt: str) -> tuple[float, ...]:
    return runtime.score([runtime.prepare(prompt)])[0].quality


def learned(record: Record) -> Example:
    return Example(record.id, {"small": 1.0})
"""
WRONG = """
from depo_gateway import DepoConfig, DepoTrainer, Example, Record, Runtime
from depo_gateway import Absent  # wrong

one: int = DepoConfig(output_dir="out").depo  # wrong
two = DepoTrainer(model="policy", args="plus")  # wrong


def three(runtime: Runtime, record: Record) -> None:
    runtime.score("prompt").absent  # wrong
    record.absent  # wrong
    Example(1)  # wrong
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's directory."""
    for name in ("estimator", "gateway", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    return tmp_path


def run(image: Image, project: Path, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(project)}
    return subprocess.run(
        [image.directory / "bin" / program, *words],
        cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_every_command_has_a_help_text(training_image: Image, project: Path) -> None:
    listed = run(training_image, project, "depo-train", "--help").stdout
    commands = re.findall(r"^    ([a-z]+)(?:  |$)", listed, re.MULTILINE)
    assert {"calibrate", "collect", "evaluate", "fit", "refresh", "rl"} <= set(commands)
    with ThreadPoolExecutor(2) as several:
        helps = several.map(lambda command: run(training_image, project, "depo-train", command, "--help"), commands)
    for command, done in zip(commands, helps, strict=True):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: depo-train {command} ")
    version = run(training_image, project, "depo-train", "--version")
    assert version.stdout == f"depo-train {depo_gateway.__version__}\n"


def test_fit(training_image: Image, project: Path, tiny_encoder: Path) -> None:
    write_table(project / "table.jsonl", 80)
    words = ["--outcomes", "table.jsonl", "--pools", "small=s", "large=l", "--encoder", str(tiny_encoder)]
    small = ["--layers", "0", "--folds", "2", "--max-epochs", "1", "--max-tokens", "32"]
    done = run(training_image, project, "depo-train", "fit", *words, *small, "--out", "fitted")
    assert done.returncode == 0, done.stderr
    assert (project / "fitted/model.onnx").exists()


def test_rl_on_two_processes(training_image: Image, project: Path, tiny_encoder: Path) -> None:
    """accelerate starts `python -m depo_gateway.training`, and reward workers are started from it."""
    policy.save(project / "policy", chat=True)
    policy.prompts().to_json(project / "prompts.jsonl")
    (project / "rewards.py").write_text(REWARDS)
    settings = f"model_name_or_path: policy\ndataset: prompts.jsonl\noutput_dir: out\n{TINY}\nddp_backend: gloo\n"
    settings += f"depo: faithful\ndepo_encoder: {tiny_encoder}\ndepo_trunk: false\ndepo_max_tokens: 64\n"
    (project / "run.yaml").write_text(settings + "reward: [number, 'rewards.py:parity']\n")
    flags = ("--multi_gpu", "--num_processes", "2")  # as accelerate names several processes, on CPUs too
    done = run(training_image, project, "depo-train", "rl", "--config", "run.yaml", "--max_steps=2", "--", *flags)
    assert done.returncode == 0, done.stderr
    assert "out: the policy after 2 steps, 32 completions" in done.stdout
    assert (project / "out/estimator/current").exists()


def test_the_public_names_have_types_that_mypy_checks(training_image: Image, project: Path) -> None:
    names = ", ".join(name for name in depo_gateway.__all__ if name != "__version__")
    (project / "right.py").write_text(RIGHT.replace("NAMES", names))
    (project / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--python-executable={training_image.directory}/bin/python",
         "--cache-dir=cache", "right.py", "wrong.py"],
        cwd=project, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    expected = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    errors = re.findall(r"^(\S+):(\d+): error:", done.stdout, re.MULTILINE)
    assert {(name, int(number)) for name, number in errors} == {("wrong.py", number) for number in expected}, done
