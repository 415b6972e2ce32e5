"""The Prometheus metrics of `depo-train rl` against TRL's log of the same run: a tiny policy on CPU."""

import math
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from depo_gateway.training.__main__ import main
from depo_gateway.training.rl.metrics import DEPO_METRICS, TRL_METRICS, MetricsCallback, RunMetrics, listen_address
from tests.training.rl import policy
from tests.training.rl.test_trainer import rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
ROOT = Path(__file__).parents[3]
PLUS = {"depo": "plus", "depo_warmup": 1, "max_steps": 6}
TELLING = """
import os
import pathlib
import urllib.request

from tests.training.rl.policy import reward

def telling(prompts, completions, **columns):  # scrapes the run from within a generation
    with urllib.request.urlopen(os.environ["METRICS_URL"]) as page:
        pathlib.Path("page.prom").write_bytes(page.read())
    return reward(prompts, completions)
"""
RUN = """
model_name_or_path: policy
dataset: prompts.jsonl
reward: ['telling.py:telling']
output_dir: out
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
num_generations: 4
max_completion_length: 6
max_steps: 4
save_steps: 2
logging_steps: 1
gradient_checkpointing: false
bf16: false
use_cpu: true
report_to: none
beta: 0.1
depo: plus
depo_warmup: 1
depo_trunk: false
depo_max_tokens: 64
"""
Samples = dict[tuple[str, str], float]  # (name, values of its labels) -> value


def samples(page: str) -> Samples:
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def ran(place: Path, encoder: Path | None, resume: bool = False, **settings: Any) -> tuple[Samples, list[Any], Any]:
    """A run of the trainer: its metrics at the end, the rows of its log, the trainer."""
    made = trainer(place, encoder, **settings)
    metrics = RunMetrics("0")
    MetricsCallback(metrics, made)
    made.train(resume_from_checkpoint=resume)
    return samples(generate_latest(metrics.registry).decode()), rows(made), made


def test_every_figure_is_what_trl_logs(tmp_path: Path, tiny_encoder: Path) -> None:
    found, logged, made = ran(tmp_path, tiny_encoder, **PLUS, dynamic_sampling=True)
    assert len(logged) == 6
    for key, (name, _) in {**TRL_METRICS, **DEPO_METRICS}.items():
        if key == "kl":  # needs a policy with a name: below
            continue
        told = [row[key] for row in made.state.log_history if key in row]
        assert told, key
        assert found[name, ""] == pytest.approx(told[-1]), key
    for term in ("advantage", "distillation", "ranking"):
        assert found["training_estimator_loss", term] == logged[-1][f"depo/loss_{term}"]
    assert found["training_function_reward", "reward"] == logged[-1]["rewards/reward/mean"]
    assert found["training_step", ""] == found["training_steps_planned", ""] == 6
    assert found["training_run_info", "plus true "] == 1


def test_counters_add_up(tmp_path: Path, tiny_encoder: Path) -> None:
    found, logged, _ = ran(tmp_path, tiny_encoder, **PLUS, dynamic_sampling=True)
    before, zero = 0, 0.0
    for row in logged:
        zero += row["depo/zero_advantage_share"] * (row["depo/completions"] - before) / 4
        before = row["depo/completions"]
    assert found["training_completions_total", ""] == before
    assert found["training_groups_total", "zero"] == pytest.approx(zero)
    assert found["training_groups_total", "nonzero"] == pytest.approx(before / 4 - zero)
    assert 0 < zero < before / 4
    assert found["training_scored_prompts_total", ""] == sum(row["depo/scored"] for row in logged) > 0
    assert found["training_explored_prompts_total", ""] == sum(row["depo/explored"] for row in logged) > 0
    assert found["training_tokens_total", ""] == logged[-1]["num_tokens"]
    parts = {part: found["training_seconds_total", part] for part in ("selection", "rollout", "estimator", "policy")}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(found["training_step_duration_seconds_sum", ""])
    assert found["training_step_duration_seconds_count", ""] == 6


def test_a_resumed_run_counts_what_it_adds(tmp_path: Path, tiny_encoder: Path) -> None:
    saving = {"depo": "plus", "depo_warmup": 1, "save_strategy": "steps", "save_steps": 2}
    first, _, _ = ran(tmp_path, tiny_encoder, **saving, max_steps=2)
    assert first["training_completions_total", ""] == 32
    assert first["training_last_checkpoint_timestamp_seconds", ""] > 0
    found, logged, made = ran(tmp_path, tiny_encoder, **saving, max_steps=3, resume=True)
    assert made.completions == logged[-1]["depo/completions"] == 48
    assert found["training_completions_total", ""] == 16
    assert 0 < found["training_tokens_total", ""] < logged[-1]["num_tokens"]
    assert (found["training_step", ""], found["training_step_duration_seconds_count", ""]) == (3, 1)


def test_what_a_run_lacks_is_not_a_number(tmp_path: Path) -> None:
    found, logged, _ = ran(tmp_path, None)
    assert found["training_reward", ""] == logged[-1]["reward"]
    assert found["training_zero_advantage_ratio", ""] == logged[-1]["depo/zero_advantage_share"]
    for name in ("kept_ratio", "false_reject_ratio", "estimator_auroc", "kl", "last_checkpoint_timestamp_seconds"):
        assert math.isnan(found[f"training_{name}", ""]), name
    assert not [key for key in found if key[0] == "training_estimator_loss"]
    assert found["training_scored_prompts_total", ""] == found["training_seconds_total", "selection"] == 0


def test_gradings_that_fail_are_counted(tmp_path: Path) -> None:
    from contextlib import closing

    from depo_gateway.training.rewards.reward_functions import reward_function

    (tmp_path / "odd.py").write_text(
        "def odd(completion, reference):\n    return 1.0 if int(reference) % 2 else None\n"
    )
    with closing(reward_function(f"{tmp_path / 'odd.py'}:odd", "answer", 5.0)) as odd:
        found, logged, _ = ran(tmp_path / "out", None, reward=[odd])
    assert found["training_lost_rewards_total", "failure"] == sum(r["depo/reward_failures"] for r in logged) > 0
    assert found["training_lost_rewards_total", "timeout"] == 0
    assert 0 < found["training_missing_rewards_ratio", ""] < 1


def test_completions_without_a_result_are_counted(tmp_path: Path) -> None:
    from contextlib import closing

    from depo_gateway.training.rewards.reward_functions import reward_function

    with closing(reward_function("choice", "answer", 5.0)) as choice:
        found, logged, _ = ran(tmp_path / "out", None, reward=[choice])
    unreadable, unusable = ([row[f"depo/reward_{name}"] for row in logged] for name in ("unreadable", "references"))
    assert found["training_unreadable_completions_total", ""] == sum(unreadable)
    assert found["training_lost_rewards_total", "reference"] == sum(unusable)
    assert sum(unreadable) + sum(unusable) > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:9101", ("127.0.0.1", 9101)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:80", ("localhost", 80)),
        ("9101", None),
        (":9101", None),
        ("127.0.0.1", None),
        ("127.0.0.1:http", None),
        ("127.0.0.1:99999", None),
        ("http://127.0.0.1:9101", None),
        ("127.0.0.1:9101/metrics", None),
        ("", None),
    ],
)
def test_addresses(text: str, found: tuple[str, int] | None) -> None:
    if found is not None:
        assert listen_address(text) == found
    else:
        with pytest.raises(ValueError, match="it must be an address and a port"):
            listen_address(text)


@pytest.fixture
def prepared(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A directory with all that a run needs, to run in; then run.yaml for a free port, or one that is given."""
    monkeypatch.chdir(tmp_path)
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    policy.save(tmp_path / "policy", chat=True)
    policy.prompts().to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "telling.py").write_text(TELLING)

    def preparing(port: int | None = None) -> str:
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        (tmp_path / "run.yaml").write_text(f"{RUN}depo_encoder: {tiny_encoder}\nmetrics_listen: 127.0.0.1:{port}\n")
        monkeypatch.setenv("METRICS_URL", f"http://127.0.0.1:{port}/metrics")
        return f"http://127.0.0.1:{port}/metrics"

    return preparing


def test_a_run_is_scraped_while_it_lasts(prepared: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    url = prepared()
    capfd.readouterr()
    assert main(["rl", "--config", "run.yaml"]) == 0
    assert capfd.readouterr().err == f"depo-train rl: metrics on {url}\n"
    page = Path("page.prom").read_text()  # of the fourth generation, while it was graded
    found = samples(page)
    assert (found["training_step", ""], found["training_steps_planned", ""]) == (3, 4)
    assert found["training_run_info", "plus false policy"] == 1
    assert found["training_completions_total", ""] == 24
    assert found["training_kl", ""] >= 0
    assert found["training_last_checkpoint_timestamp_seconds", ""] > 0
    assert found["training_last_step_timestamp_seconds", ""] > found["training_last_checkpoint_timestamp_seconds", ""]
    with pytest.raises(urllib.error.URLError):  # nothing is left listening
        urllib.request.urlopen(url)


def test_promtool_has_nothing_to_say(tmp_path: Path, tiny_encoder: Path) -> None:
    if shutil.which("promtool") is None:
        reason = "Debian's package prometheus isn't installed"
        pytest.fail(reason) if os.environ.get("DEPO_NEEDS_PROMETHEUS") == "1" else pytest.skip(reason)
    made = trainer(tmp_path, tiny_encoder, **PLUS)
    metrics = RunMetrics("0")
    MetricsCallback(metrics, made)
    made.train()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_mistaken_address_is_one_line(prepared: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        prepared(taken.getsockname()[1])
        capfd.readouterr()
        assert main(["rl", "--config", "run.yaml"]) == 2
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert (
            capfd.readouterr().err
            == f"depo-train rl: metrics_listen: can't listen on {where}: Address already in use\n"
        )
    assert main(["rl", "--config", "run.yaml", "--metrics_listen", "9101"]) == 2
    said = "depo-train rl: metrics_listen is '9101'; it must be an address and a port, such as 127.0.0.1:9101\n"
    assert capfd.readouterr().err == said
    assert not Path("out").exists()


LEAVING = """
import sys
from tests.training.rl.ranks import gloo_threads
from depo_gateway.training.__main__ import main
code = main()
sys.stdout.write(f"threads of gloo's: {gloo_threads()}\\n")
sys.exit(code)
"""


@pytest.mark.slow
def test_of_two_processes_the_first_alone_serves(prepared: Callable[..., str]) -> None:
    """A second server on the same port would fail."""
    url = prepared()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", LEAVING, "rl", "--config", "run.yaml", "--ddp_backend", "gloo"],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("threads of gloo's: []") == 2, done.stdout  # they abort a normal exit
    assert done.stderr.count(f"metrics on {url}") == 1
    found = samples(Path("page.prom").read_text())
    assert found["training_completions_total", ""] == 48  # 16 of both processes in each of three steps
