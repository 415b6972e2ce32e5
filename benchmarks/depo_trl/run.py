"""One run: DepoTrainer on a task, with the time of its phases. Its log is the result that the report reads."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback

from benchmarks.depo.encoder import save_encoder
from benchmarks.depo_trl.start import task_of
from benchmarks.depo_trl.tasks import LIMITS, VERIFIERS, rows
from depo_gateway.estimator.encoder import DEFAULT_ENCODER
from depo_gateway.training.rewards.reward_functions import reward_function
from depo_gateway.training.rl.config import DepoConfig
from depo_gateway.training.rl.trainer import DepoTrainer

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"dynamic_sampling": True, "epsilon_high": 0.28},
    "depo": {"depo": "faithful"},
    "depo-plus": {"depo": "plus"},
}
WARMUP = 0.1  # share of the steps that keep every prompt, as in the paper: 100 of 1,000
LOOP, ASIDE = "updating the policy", "evaluating"
PHASES = ("generating", "grading", "scoring", "updating the estimator", LOOP)
# The estimator for chains starts from random weights and has few labels, as in benchmarks.depo
CHAINS_ESTIMATOR = {"depo_learning_rate": 1e-3, "depo_encoder_learning_rate": 1e-3, "depo_max_tokens": 64}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of all runs of a comparison. A generation is one policy step of `prompts` groups."""

    policy: str
    sft_steps: int
    steps: int
    prompts: int
    group_size: int
    micro: int  # completions in one forward and backward pass
    learning_rate: float
    train_rows: int
    held_out: int
    evaluations: int
    encoder: str  # "": the task's
    extra: dict[str, Any]  # other settings of DepoConfig


class Clock:
    """Seconds by phase. Time of a nested phase counts for it alone; within ASIDE all time counts for ASIDE."""

    def __init__(self, device: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._gpu = device.startswith("cuda")
        self._phases: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.tick()
        self._phases.append(ASIDE if ASIDE in self._phases else name)
        try:
            yield
        finally:
            self.tick()
            self._phases.pop()

    def tick(self) -> None:
        """Add the time since the last call to the current phase, after the GPU has finished its work."""
        if self._gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phases:
            self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return called


class TimedTrainer(DepoTrainer):
    """Logs the seconds of each phase so far, and the completions and tokens generated."""

    def __init__(self, clock: Clock, **others: Any) -> None:
        self.clock, self.tokens = clock, 0
        super().__init__(**others)
        self.selector.take = clock.timed("scoring", self.selector.take)  # type: ignore[method-assign]
        self.selector.step = clock.timed("updating the estimator", self.selector.step)  # type: ignore[method-assign]

    def _generate(self, prompts: Any) -> Any:
        with self.clock.phase("generating"):
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self.model is not None and self.model.training:
            self.tokens += sum(map(len, completion_ids_list))
        with self.clock.phase("grading"):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase(LOOP):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase(ASIDE):
            return super().evaluate(*args, **kwargs)

    def export(self) -> Path | None:
        """Exports nothing: the comparison ends when the policy is trained."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.clock.tick()
        logs |= {"completions": self.completions, "tokens": self.tokens}
        logs |= {f"seconds/{phase}": self.clock.seconds[phase] for phase in (*PHASES, ASIDE)}
        if "eval_loss" in logs:
            spent = ", ".join(f"{phase} {self.clock.seconds[phase]:.1f}" for phase in PHASES)
            print(f"  step {self.state.global_step}, {self.completions} completions; seconds: {spent}", flush=True)
        super().log(logs, start_time)


def run(method: str, seed: int, settings: Settings, start: Path, place: Path, device: str) -> dict[str, Any]:
    """A run's result: {"method", "seed", "settings", "evaluations", "steps"}; its counts and seconds are cumulative.

    `place`: the trainer's output directory. Raises ValueError for settings that do not fit together.
    """
    task = task_of(settings.policy)
    disable_progress_bars()
    train, held_out = (
        Dataset.from_list([{key: row[key] for key in ("prompt", "answer")} for row in rows(task, split, count)])
        for split, count in (("train", settings.train_rows), ("evaluate", settings.held_out))
    )
    config = config_of(method, seed, settings, place, device)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    clock = Clock(device)
    with closing(reward_function(VERIFIERS[task])) as reward:
        trainer = TimedTrainer(
            clock,
            model=str(start),
            processing_class=tokenizer,
            args=config,
            reward_funcs=[reward],
            train_dataset=train,
            eval_dataset=held_out,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if not any("eval_reward" in row and row["step"] == settings.steps for row in trainer.state.log_history):
            trainer.evaluate()
    history = trainer.state.log_history
    zero = next(row for row in history if "eval_reward" in row)  # before the first step
    return {
        "method": method,
        "seed": seed,
        "settings": asdict(settings),
        "evaluations": [
            {"step": row["step"], "accuracy": row["eval_reward"], **counted(row, zero)}
            for row in history
            if "eval_reward" in row
        ],
        "steps": [
            {"step": row["step"], **counted(row, zero), **{k: v for k, v in row.items() if k.startswith("depo/")}}
            for row in history
            if "depo/completions" in row
        ],
    }


def counted(row: dict[str, Any], zero: dict[str, Any]) -> dict[str, Any]:
    """The counts and seconds of a row of the log, less the seconds until the row `zero`."""
    return {
        "completions": row["completions"],
        "tokens": row["tokens"],
        "seconds": {phase: round(row[f"seconds/{phase}"] - zero[f"seconds/{phase}"], 4) for phase in PHASES},
    }


def config_of(method: str, seed: int, settings: Settings, place: Path, device: str) -> DepoConfig:
    """All methods have DAPO's token-mean loss, no KL, temperature 1. Raises ValueError for wrong settings."""
    completions = settings.prompts * settings.group_size
    micro = min(settings.micro, completions)
    if completions % micro:
        raise ValueError(f"a step has {completions} completions, which --micro {micro} does not divide")
    known = {field.name for field in fields(DepoConfig)}
    if unknown := sorted(set(settings.extra) - known):
        raise ValueError(f"--set {unknown[0]}: there is no such setting")
    kwargs: dict[str, Any] = {
        "output_dir": str(place),
        "seed": seed,
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": completions // micro,
        "num_generations": settings.group_size,
        "max_completion_length": LIMITS[task_of(settings.policy)],
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(10, settings.steps // 10),
        "loss_type": "dapo",
        "beta": 0.0,
        "temperature": 1.0,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": max(1, settings.steps // settings.evaluations),
        "eval_on_start": True,
        "per_device_eval_batch_size": largest_divisor(settings.held_out, max(completions, 64)),
        "num_generations_eval": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **METHODS[method],
    }
    if "depo" in METHODS[method]:
        kwargs |= {"depo_warmup": max(1, round(WARMUP * settings.steps)), **estimator_of(settings, place, seed)}
        extra = settings.extra
    else:
        extra = {key: value for key, value in settings.extra.items() if not key.startswith("depo_")}
    try:
        return DepoConfig(**(kwargs | extra))
    except TypeError as error:
        raise ValueError(f"--set: {error}") from None


def estimator_of(settings: Settings, place: Path, seed: int) -> dict[str, Any]:
    """The estimator's settings: for chains a new encoder that reads characters, otherwise a pretrained one."""
    if settings.encoder or task_of(settings.policy) != "chains":
        return {"depo_encoder": settings.encoder or DEFAULT_ENCODER, "depo_max_tokens": 128}
    save_encoder(place / "encoder", seed=seed)
    return {"depo_encoder": str(place / "encoder"), **CHAINS_ESTIMATOR}


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`: with batches of equal size their mean is the overall mean."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def parsed(words: list[str]) -> dict[str, Any]:
    """The `KEY=VALUE` words, with values in YAML. Raises ValueError for a word without `=`."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--set {wrong[0]}: write KEY=VALUE")
    return {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words)}
