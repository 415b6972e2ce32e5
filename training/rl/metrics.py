"""The Prometheus metrics of `depo-train rl`: their declarations, the callback that sets them, their HTTP endpoint.

Counters count what this process did, so a resumed run adds only its own part; `training_step` is the run's position. A
gauge is NaN until it has a value: a run with depo off has no kept share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from transformers import TrainerCallback

if TYPE_CHECKING:
    from depo_gateway.training.rl.trainer import DepoTrainer

STEP_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)
# name in TRL's log, where it is a mean over the logging window -> (metric, help)
TRL_METRICS = {
    "reward": ("training_reward", "Mean reward of the completions"),
    "reward_std": (
        "training_reward_std",
        "Standard deviation of the rewards, of groups or batches as scale_rewards says",
    ),
    "loss": ("training_loss", "Loss of the policy"),
    "learning_rate": ("training_learning_rate", "Learning rate of the policy"),
    "grad_norm": ("training_grad_norm", "Norm of the policy's gradient before clipping"),
    "entropy": ("training_entropy", "Mean entropy of the policy's next token"),
    "kl": ("training_kl", "KL divergence from the reference policy; only with beta above 0"),
    "clip_ratio/region_mean": ("training_clip_ratio", "Share of tokens whose probability ratio is clipped"),
    "completions/mean_length": ("training_completion_tokens", "Mean length of a completion"),
    "completions/clipped_ratio": ("training_truncated_ratio", "Share of completions truncated at the maximum length"),
    "depo/missing_rewards": ("training_missing_rewards_ratio", "Share of completions without a reward"),
}
# name in DepoTrainer's own metrics, of the newest generation -> (metric, help)
DEPO_METRICS = {
    "depo/kept": (
        "training_kept_ratio",
        "Share of the prompts considered that were rolled out, without the explored ones",
    ),
    "depo/pass_rate": ("training_pass_rate", "Mean reward of the groups rolled out, scaled to 0 to 1"),
    "depo/zero_advantage_share": (
        "training_zero_advantage_ratio",
        "Share of the groups rolled out with zero advantage",
    ),
    "depo/zero_advantage_trained": (
        "training_zero_advantage_trained_ratio",
        "Share of the groups trained on with zero advantage",
    ),
    "depo/rounds": ("training_rounds", "Rounds of the generation; more than 1 only with dynamic sampling"),
    "depo/epoch": ("training_data_epoch", "Passes of the prompt stream over the data set"),
    "depo/false_reject_rate": (
        "training_false_reject_ratio",
        "Share of the explored rejects that had an advantage",
    ),
    "depo/auroc": ("training_estimator_auroc", "AUROC of the predictions for groups with an advantage, newest 512"),
    "depo/calibration_error": (
        "training_estimator_calibration_error",
        "Calibration error of the predicted pass rate, newest 512 groups",
    ),
    "depo/rollouts_saved_estimate": (
        "training_completions_saved",
        "Estimated completions without advantage that rejecting prompts avoided, since the run began",
    ),
}
LOSS, FUNCTION, MEAN = "depo/loss_", "rewards/", "/mean"  # the rest of such a name is a label
PARTS = {"depo/seconds_scoring": "selection", "depo/seconds_rollout": "rollout", "depo/seconds_updating": "estimator"}
REST = "policy"  # the remaining time of a step
LOST_REWARDS = {
    "depo/reward_timeouts": "timeout",
    "depo/reward_failures": "failure",
    "depo/reward_references": "reference",
}


class RunMetrics:
    """The metrics of one run, in a registry of their own. All labels come from closed sets."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("training_build_info", "Build", ["version"], registry=registry).labels(version).set(1)
        self.info = Gauge("training_run_info", "The run", ["policy", "depo", "dynamic_sampling"], registry=registry)
        self.step = Gauge("training_step", "Steps taken by the policy", registry=registry)
        self.steps_planned = Gauge("training_steps_planned", "Steps planned for the run", registry=registry)
        self.step_duration = Histogram(
            "training_step_duration_seconds", "Duration of a policy step", buckets=STEP_SECONDS, registry=registry
        )
        self.seconds = Counter("training_seconds_total", "Time of the steps by part", ["part"], registry=registry)
        self.last_step = Gauge(
            "training_last_step_timestamp_seconds", "Time of the end of the newest step", registry=registry
        )
        self.last_checkpoint = Gauge(
            "training_last_checkpoint_timestamp_seconds",
            "Time of the newest complete checkpoint",
            registry=registry,
        )
        self.completions = Counter("training_completions_total", "Completions rolled out", registry=registry)
        self.groups = Counter("training_groups_total", "Prompts rolled out", ["advantage"], registry=registry)
        self.scored = Counter(
            "training_scored_prompts_total", "Prompts that the estimator scored before a rollout", registry=registry
        )
        self.explored = Counter(
            "training_explored_prompts_total", "Rejected prompts that were rolled out as exploration", registry=registry
        )
        self.lost = Counter(
            "training_lost_rewards_total",
            "Completions without a reward, by reason",
            ["reason"],
            registry=registry,
        )
        self.unreadable = Counter(
            "training_unreadable_completions_total",
            "Completions rewarded 0 because the verifier found no result in them",
            registry=registry,
        )
        self.tokens = Counter(
            "training_tokens_total", "Tokens of prompts and completions, as TRL counts them", registry=registry
        )
        self.estimator_loss = Gauge(
            "training_estimator_loss", "The estimator's loss before its newest update", ["term"], registry=registry
        )
        self.function_reward = Gauge(
            "training_function_reward", "Mean of one reward function", ["function"], registry=registry
        )
        self.figures = {
            key: Gauge(name, text, registry=registry) for key, (name, text) in {**TRL_METRICS, **DEPO_METRICS}.items()
        }
        for gauge in (self.last_step, self.last_checkpoint, *self.figures.values()):
            gauge.set(math.nan)
        for part in (*PARTS.values(), REST):
            self.seconds.labels(part)
        for advantage in ("zero", "nonzero"):
            self.groups.labels(advantage)
        for reason in LOST_REWARDS.values():
            self.lost.labels(reason)


class MetricsCallback(TrainerCallback):
    """Updates the metrics from a trainer, which it adds itself to."""

    def __init__(self, metrics: RunMetrics, trainer: DepoTrainer) -> None:
        self.metrics, self._trainer = metrics, trainer
        self._began = self._attributed = 0.0  # of the current step: its start, its seconds that belong to a PART
        self._completions, self._tokens = 0.0, 0
        trainer.on_metrics = self.update
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        policy = str(getattr(self._trainer.model.config, "name_or_path", ""))
        self.metrics.info.labels(policy, args.depo, str(args.dynamic_sampling).lower()).set(1)
        self.metrics.step.set(state.global_step)
        self.metrics.steps_planned.set(state.max_steps)
        self._completions, self._tokens = self._trainer.completions, state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._attributed = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.perf_counter() - self._began
        self.metrics.step_duration.observe(took)
        self.metrics.seconds.labels(REST).inc(max(0.0, took - self._attributed))
        self.metrics.step.set(state.global_step)
        self.metrics.last_step.set_to_current_time()
        self.metrics.tokens.inc(max(0, state.num_input_tokens_seen - self._tokens))
        self._tokens = state.num_input_tokens_seen

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics.last_checkpoint.set_to_current_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if name in TRL_METRICS:
                self.metrics.figures[name].set(math.nan if value is None else value)
            elif name.startswith(FUNCTION) and name.endswith(MEAN):
                function = name.removeprefix(FUNCTION).removesuffix(MEAN)
                self.metrics.function_reward.labels(function).set(math.nan if value is None else value)

    def update(self, values: Mapping[str, float]) -> None:
        """The trainer's metrics of a generation, or of a step of the selector."""
        metrics = self.metrics
        for name, value in values.items():
            if name in DEPO_METRICS:
                metrics.figures[name].set(value)
            elif name in PARTS:
                metrics.seconds.labels(PARTS[name]).inc(value)
                self._attributed += value
            elif name in LOST_REWARDS:
                metrics.lost.labels(LOST_REWARDS[name]).inc(value)
            elif name == "depo/reward_unreadable":
                metrics.unreadable.inc(value)
            elif name.startswith(LOSS):
                metrics.estimator_loss.labels(name.removeprefix(LOSS)).set(value)
        metrics.scored.inc(values.get("depo/scored", 0.0))
        metrics.explored.inc(values.get("depo/explored", 0.0))
        if "depo/completions" in values:
            fresh = values["depo/completions"] - self._completions
            self._completions += fresh
            groups = fresh / self._trainer.args.num_generations
            zero = round(groups * values["depo/zero_advantage_share"])
            metrics.completions.inc(fresh)
            metrics.groups.labels("zero").inc(zero)
            metrics.groups.labels("nonzero").inc(groups - zero)


def listen_address(text: str) -> tuple[str, int]:
    """(host, port) of `host:port`. Raises ValueError for any other text."""
    try:
        split = urlsplit(f"//{text}")
        if split.hostname and split.port is not None and split.netloc == text and "@" not in text:
            return split.hostname, split.port
    except ValueError:
        pass
    raise ValueError(f"metrics_listen is {text!r}; it must be an address and a port, such as 127.0.0.1:9101")


@contextmanager
def metrics_endpoint(listen: str, metrics: RunMetrics) -> Iterator[int]:
    """Serves the metrics at http://LISTEN/metrics within it. Yields the port.

    Raises ValueError for an address that is malformed, in use, or not of this machine.
    """
    host, port = listen_address(listen)
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ValueError(f"metrics_listen: can't listen on {listen}: {error.strerror}") from None
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
