import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import demo_routing

ROOT = Path(__file__).parents[2]


def test_its_command_runs_from_the_root_of_the_repository() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "benchmarks.demo_routing", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "--threshold" in shown.stdout


def test_the_longest_prompts_go_to_the_large_pool_and_equal_ones_share_the_rest() -> None:
    lengths_N = np.array([4.0, 6.0, 6.0, 6.0, 8.0])
    assert demo_routing.by_length(lengths_N, 0.4).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 1])
    for share in (0.0, 0.1, 0.5, 0.93, 1.0):
        assert demo_routing.by_length(lengths_N, share).mean() == pytest.approx(share)


def test_a_perfect_estimator_beats_both_baselines_and_a_random_one_neither() -> None:
    rng = np.random.default_rng(0)
    lengths_N = rng.integers(1, 9, 2000).astype(float)
    hard_N = rng.random(2000) < 0.5
    correct_N2 = np.stack([1.0 - hard_N, np.ones(2000)], 1)
    knows_N2 = np.stack([np.where(hard_N, 0.2, 0.9), np.full(2000, 0.95)], 1)
    row = demo_routing.compare(correct_N2, knows_N2, lengths_N, 0.7)
    assert row.large_share == pytest.approx(hard_N.mean())
    assert row.accuracy == 1.0
    assert row.over_random[1] > 0.2
    assert row.over_length[1] > 0.2
    guesses_N2 = np.stack([rng.random(2000), np.full(2000, 0.95)], 1)
    row = demo_routing.compare(correct_N2, guesses_N2, lengths_N, 0.7)
    assert row.over_random[1] < 0 < row.over_random[2]
    assert row.over_length[1] < 0 < row.over_length[2]
