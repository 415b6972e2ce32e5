"""The board of training runs, each query of it executed: a real Prometheus scrapes a real `depo-train rl`."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.monitoring import servers, traffic
from tests.monitoring.panels import PANELS, Panel, several, shows
from tests.monitoring.servers import Prometheus, prometheus
from tests.training.rl import policy

pytestmark = pytest.mark.slow
RUN = {
    "model_name_or_path": "policy",
    "dataset": "prompts.jsonl",
    "reward": ["telling.py:reward"],
    "output_dir": "out",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 100_000,
    "save_steps": 20,
    "save_total_limit": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "beta": 0.1,
    "depo": "plus",
    "depo_warmup": 1,
    "depo_trunk": False,
    "depo_max_tokens": 64,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[Prometheus]:
    """A Prometheus that watches a real `depo-train rl` of a tiny policy, which has saved a checkpoint."""
    servers.program("prometheus")
    place = tmp_path_factory.mktemp("run")
    policy.save(place / "policy", chat=True)
    policy.prompts().to_json(place / "prompts.jsonl")
    (place / "telling.py").write_text("from tests.training.rl.policy import reward\n")
    address = f"127.0.0.1:{servers.free_port()}"
    settings = {**RUN, "depo_encoder": str(tiny_encoder), "metrics_listen": address}
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    words = ["training", "rl", "--config", "run.yaml"]
    with traffic.Program(words, place / "run.log", quiet) as program:
        program.says(r"metrics on (\S+)")
        with prometheus(place / "prometheus", several(training=address)) as server:
            enough = "training_last_checkpoint_timestamp_seconds > 0 and training_false_reject_ratio >= 0"
            assert server.wait(enough, 120.0), program.said()[-3000:]
            time.sleep(3.0)
            assert program.process.poll() is None, program.said()[-3000:]
            yield server


@pytest.mark.parametrize("panel", [panel for panel in PANELS if panel.board == "training-run"], ids=str)
def test_a_panel_shows_the_run(run: Prometheus, panel: Panel) -> None:
    shows(run, panel)
