"""Two processes over gloo: the same prompts, the same estimator, and a clear error where they differ."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from depo_gateway.training.rl.run_state import resumable

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_ranks_choose_alike(tmp_path: Path, tiny_encoder: Path) -> None:
    # accelerate launch --cpu --num_processes 2 would silently run one process; torch's launcher runs two
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "-m", "tests.training.rl.ranks", str(tmp_path), str(tiny_encoder)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for name in ("plus", "dapo"):
        first, second = (rank[name] for rank in ranks)
        assert first["world"] == second["world"] == 2
        assert not first["error"]
        for key in ("chosen", "weights", "state", "completions", "items"):
            assert first[key] == second[key], (name, key)
        assert first["completions"] == 4 * sum(map(len, first["chosen"]))
        advantages = defaultdict(list)
        for rank in (first, second):  # each group is whole over the ranks
            for prompt, advantage in zip(rank["prompts"], rank["advantages"], strict=True):
                advantages[prompt].append(advantage)
        assert {len(group) for group in advantages.values()} == {4}
        assert all(abs(sum(group)) < 1e-3 for group in advantages.values())
        assert first["items"] == [first["tokens"][0] + second["tokens"][0]]
    assert len(ranks[0]["plus"]["chosen"]) == 4
    assert [share for share in ranks[0]["dapo"]["trained"] if share is not None] == [0.0] * 4
    assert [rank["broken"]["error"] for rank in ranks] == ["the reward function broke"] * 2
    assert resumable(tmp_path / "broken") == [tmp_path / "broken/checkpoint-2"]  # as no rank was left waiting
    for rank in ranks:  # the negative control: other seeds
        assert rank["control"]["error"].startswith("the processes chose different prompts (")
