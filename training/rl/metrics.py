"""Every Prometheus metric of `depo-train rl`, declared once, and what feeds and serves them: one run, one process.

Counters count what this process did, so that a resumed run adds no more than it does; `training_step` says where the
run stands. A gauge is NaN until its figure exists: a run with depo off has no kept share.
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
# name in TRL's log, a mean over its logging window -> (metric, what it is)
LOGGED = {
    "reward": ("training_reward", "Mean reward of the completions"),
    "reward_std": ("training_reward_std", "Standard deviation of the rewards, of a group's or a batch's as TRL scales"),
    "loss": ("training_loss", "The policy's loss"),
    "learning_rate": ("training_learning_rate", "Learning rate of the policy"),
    "grad_norm": ("training_grad_norm", "Norm of the policy's gradient before it is clipped"),
    "entropy": ("training_entropy", "Mean entropy of the policy's next token"),
    "kl": ("training_kl", "Divergence from the reference policy; beta above 0 only"),
    "clip_ratio/region_mean": ("training_clip_ratio", "Share of tokens whose probability ratio is clipped"),
    "completions/mean_length": ("training_completion_tokens", "Mean length of a completion"),
    "completions/clipped_ratio": ("training_truncated_ratio", "Share of completions cut off at their longest"),
    "depo/missing_rewards": ("training_missing_rewards_ratio", "Share of completions that have no reward"),
}
# name in the trainer's own log, as of the newest generation -> (metric, what it is)
NOTED = {
    "depo/kept": (
        "training_kept_ratio",
        "Share of the prompts considered that were rolled out, explored ones left out",
    ),
    "depo/pass_rate": ("training_pass_rate", "Mean quality of the groups rolled out"),
    "depo/zero_advantage_share": ("training_zero_advantage_ratio", "Share of the groups rolled out without advantage"),
    "depo/zero_advantage_trained": (
        "training_zero_advantage_trained_ratio",
        "The same of the groups that the policy was trained on",
    ),
    "depo/rounds": ("training_rounds", "Rounds that the generation took; more than 1 with dynamic sampling only"),
    "depo/epoch": ("training_data_epoch", "How often the stream of prompts went through the data set"),
    "depo/false_reject_rate": (
        "training_false_reject_ratio",
        "Of the explored rejects, those with an advantage after all",
    ),
    "depo/auroc": ("training_estimator_auroc", "How well predictions tell groups with an advantage, 512 newest"),
    "depo/calibration_error": ("training_estimator_calibration_error", "Of the predicted quality, 512 newest groups"),
    "depo/rollouts_saved_estimate": (
        "training_completions_saved",
        "Completions of rejected prompts that would have had no advantage, since the run began; an estimate",
    ),
}
LOSS, FUNCTION, MEAN = "depo/loss_", "rewards/", "/mean"  # parts of names that carry a label
PARTS = {"depo/seconds_scoring": "selection", "depo/seconds_rollout": "rollout", "depo/seconds_updating": "estimator"}
REST = "policy"  # what a step takes beside those
LOST = {"depo/reward_timeouts": "timeout", "depo/reward_failures": "failure"}


class RunMetrics:
    """One run's metrics, on a registry of their own. Labels come from closed sets only."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("training_build_info", "Build", ["version"], registry=registry).labels(version).set(1)
        self.info = Gauge("training_run_info", "The run", ["policy", "depo", "dynamic_sampling"], registry=registry)
        self.step = Gauge("training_step", "Steps that the policy has taken", registry=registry)
        self.steps_planned = Gauge("training_steps_planned", "Steps that the run will take", registry=registry)
        self.step_duration = Histogram(
            "training_step_duration_seconds", "A step of the policy", buckets=STEP_SECONDS, registry=registry
        )
        self.seconds = Counter("training_seconds_total", "Where the steps' time went", ["part"], registry=registry)
        self.last_step = Gauge("training_last_step_timestamp_seconds", "When the newest step ended", registry=registry)
        self.last_checkpoint = Gauge(
            "training_last_checkpoint_timestamp_seconds", "When the newest checkpoint was whole", registry=registry
        )
        self.completions = Counter("training_completions_total", "Completions rolled out", registry=registry)
        self.groups = Counter("training_groups_total", "Prompts rolled out", ["advantage"], registry=registry)
        self.scored = Counter(
            "training_scored_prompts_total", "Prompts that the estimator scored before a rollout", registry=registry
        )
        self.explored = Counter(
            "training_explored_prompts_total", "Rejected prompts that were rolled out all the same", registry=registry
        )
        self.lost = Counter(
            "training_lost_rewards_total", "Completions whose grading came to nothing", ["reason"], registry=registry
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
        self.figures = {key: Gauge(name, text, registry=registry) for key, (name, text) in {**LOGGED, **NOTED}.items()}
        for gauge in (self.last_step, self.last_checkpoint, *self.figures.values()):
            gauge.set(math.nan)
        for part in (*PARTS.values(), REST):
            self.seconds.labels(part)
        for advantage in ("zero", "nonzero"):
            self.groups.labels(advantage)
        for reason in LOST.values():
            self.lost.labels(reason)


class Watch(TrainerCallback):
    """Feeds the metrics of the trainer that it is made for, from then on."""

    def __init__(self, metrics: RunMetrics, trainer: DepoTrainer) -> None:
        self.metrics, self._trainer = metrics, trainer
        self._began = self._apart = 0.0  # of the step under way: its start, seconds of it that are told apart
        self._completions, self._tokens = 0.0, 0
        trainer.noted = self.noted
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        policy = str(getattr(self._trainer.model.config, "name_or_path", ""))
        self.metrics.info.labels(policy, args.depo, str(args.dynamic_sampling).lower()).set(1)
        self.metrics.step.set(state.global_step)
        self.metrics.steps_planned.set(state.max_steps)
        self._completions, self._tokens = self._trainer.completions, state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._apart = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.perf_counter() - self._began
        self.metrics.step_duration.observe(took)
        self.metrics.seconds.labels(REST).inc(max(0.0, took - self._apart))
        self.metrics.step.set(state.global_step)
        self.metrics.last_step.set_to_current_time()
        self.metrics.tokens.inc(max(0, state.num_input_tokens_seen - self._tokens))
        self._tokens = state.num_input_tokens_seen

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics.last_checkpoint.set_to_current_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if name in LOGGED:
                self.metrics.figures[name].set(math.nan if value is None else value)
            elif name.startswith(FUNCTION) and name.endswith(MEAN):
                function = name.removeprefix(FUNCTION).removesuffix(MEAN)
                self.metrics.function_reward.labels(function).set(math.nan if value is None else value)

    def noted(self, noted: Mapping[str, float]) -> None:
        """What the trainer tells of a generation, or of what the estimator learned from it."""
        metrics = self.metrics
        for name, value in noted.items():
            if name in NOTED:
                metrics.figures[name].set(value)
            elif name in PARTS:
                metrics.seconds.labels(PARTS[name]).inc(value)
                self._apart += value
            elif name in LOST:
                metrics.lost.labels(LOST[name]).inc(value)
            elif name.startswith(LOSS):
                metrics.estimator_loss.labels(name.removeprefix(LOSS)).set(value)
        metrics.scored.inc(noted.get("depo/scored", 0.0))
        metrics.explored.inc(noted.get("depo/explored", 0.0))
        if "depo/completions" in noted:
            fresh = noted["depo/completions"] - self._completions
            self._completions += fresh
            groups = fresh / self._trainer.args.num_generations
            zero = round(groups * noted["depo/zero_advantage_share"])
            metrics.completions.inc(fresh)
            metrics.groups.labels("zero").inc(zero)
            metrics.groups.labels("nonzero").inc(groups - zero)


def address(text: str) -> tuple[str, int]:
    """(host, port) of `host:port`. Raises ValueError for anything else."""
    try:
        split = urlsplit(f"//{text}")
        if split.hostname and split.port is not None and split.netloc == text and "@" not in text:
            return split.hostname, split.port
    except ValueError:
        pass
    raise ValueError(f"metrics_listen is {text!r}; it must be an address and a port, such as 127.0.0.1:9101")


@contextmanager
def serving(listen: str, metrics: RunMetrics) -> Iterator[int]:
    """While it lasts, the metrics are at http://LISTEN/metrics; the port.

    Raises ValueError where the address is none, is taken, or is no address of this machine.
    """
    host, port = address(listen)
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
