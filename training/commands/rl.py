"""depo-train rl: train a policy by GRPO, DAPO or DEPO, from YAML files and flags, here or through accelerate."""

from __future__ import annotations

import difflib
import gc
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import types
import typing
import warnings
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from depo_gateway import __version__
from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.training.rewards.reward_functions import PairReward, reward_function
from depo_gateway.training.rewards.worker_pool import RewardError
from depo_gateway.training.rl import dataset, run_state
from depo_gateway.training.rl import metrics as run_metrics
from depo_gateway.training.rl.config import DepoConfig
from depo_gateway.training.rl.selectors.guarded_rule import SelectionRuleError
from depo_gateway.training.rl.trainer import DepoTrainer

PROCESSES_VARIABLE = "DEPO_PROCESSES"  # tells each process how many were requested
REPEAT_SECONDS = 2.0  # a second signal within them is the launcher's copy of the terminal's Ctrl-C


@dataclass
class RlArguments:
    """The data set and its rewards; other settings are TRL's (GRPOConfig, ModelConfig) and DepoConfig's."""

    dataset: str = field(metadata={"help": "Prompts: a Hugging Face name, or a JSON lines, parquet or CSV file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hugging Face data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hugging Face data set."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of text or messages; may be nested: a.b."})
    answer_column: str = field(default="answer", metadata={"help": "Column to grade against; may be nested: a.b."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message of each conversation."})
    plain_prompts: bool = field(default=False, metadata={"help": "Do not apply the chat template to text prompts."})
    reward: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={"help": "Verifiers (math, number, exact, choice) or functions: module:function, file.py:function."},
    )
    reward_deadline_s: float = field(default=5.0, metadata={"help": "Seconds for grading one completion."})
    metrics_listen: str | None = field(
        default=None, metadata={"help": "Address and port for Prometheus metrics, such as 127.0.0.1:9101."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the newest checkpoint in output_dir."})


SETTINGS = (RlArguments, DepoConfig, ModelConfig)
UNIONS = (typing.Union, types.UnionType)


class RlParser(TrlParser):  # type: ignore[misc]
    """TRL's parser, which reports a mistake as a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run(args: Namespace) -> int:
    """Run the command; args.rest holds its words. Returns 0 for success, 1 for failed or interrupted."""
    own, launching = split(args.rest)
    # deprecations between TRL and transformers
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|accelerate)\b")
    logging.getLogger("trl").setLevel(logging.ERROR)  # it prints whole rows without a reward; we count them
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    parser, flags = read_settings(own)
    if launching is not None:
        return launch(own, launching)
    code = train_policy(*parse_flags(parser, flags))
    gc.collect()  # the trainer is a reference cycle with its process group, whose threads (gloo) abort a normal exit
    return code


def split(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """(our flags, accelerate's flags, which follow --; None without it)."""
    if "--" not in words:
        return list(words), None
    at = list(words).index("--")
    return list(words[:at]), list(words[at + 1 :])


def read_settings(words: Sequence[str]) -> tuple[RlParser, list[str]]:
    """The settings of YAML files (--config) and flags, as flags for parse_flags(). Later files and flags override.

    Raises ValueError for an unknown setting, or a value of the wrong type.
    """
    parser = RlParser(SETTINGS, prog="depo-train rl", allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    files = "YAML file of settings; later files override earlier ones. Words after -- go to accelerate launch"
    parser.add_argument("--config", metavar="FILE", default=SUPPRESS, help=files)  # for --help; parsed below
    flags = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    given: dict[str, Any] = {}
    while "--config" in flags:
        at = flags.index("--config")
        if at + 1 == len(flags):
            raise ValueError("--config needs a YAML file")
        given |= read_yaml(Path(flags[at + 1]))
        del flags[at : at + 2]
    for key in given:
        if key not in known:
            raise ValueError(unknown_setting(key, known))
    defaults = [f"--disable_tqdm={not sys.stderr.isatty()}"]
    if not torch.accelerator.is_available():
        defaults += ["--use_cpu=True", "--bf16=False"]
    flags = [*defaults, *as_flags(parser, given), *flags]
    seen, rest = parser.parse_known_args(flags)
    if rest:
        raise ValueError(unknown_setting(rest[0].split("=")[0].lstrip("-"), known, flag=rest[0].startswith("-")))
    if not seen.model_name_or_path:
        raise ValueError("model_name_or_path is missing; set it to the policy, a Hugging Face name or a directory")
    return parser, flags


def parse_flags(parser: RlParser, flags: Sequence[str]) -> tuple[RlArguments, DepoConfig, ModelConfig]:
    """The settings as objects. Raises ValueError for those that do not fit together."""
    arguments, config, model = parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
    return arguments, config, model


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Its `env` sets environment variables, as in TRL."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must contain settings, one `name: value` a line")
    for name, value in (given.pop("env", None) or {}).items():
        os.environ[str(name)] = str(value)
    return {str(name): value for name, value in given.items()}


def as_flags(parser: RlParser, given: dict[str, Any]) -> list[str]:
    """A file's settings as flags, so that argparse checks their types; null and mappings become defaults.

    Raises ValueError for null, a list or a mapping where the setting takes none.
    """
    flags: list[str] = []
    several = {action.dest for action in parser._actions if action.nargs == "+"}
    hints = {name: hint for kind in SETTINGS for name, hint in typing.get_type_hints(kind).items()}
    for key, value in given.items():
        kinds = typing.get_args(hints[key]) if typing.get_origin(hints[key]) in UNIONS else (hints[key],)
        if isinstance(value, bool | int | float | str):
            flags.append(f"--{key}={value}")
        elif type(value) not in {typing.get_origin(kind) or kind for kind in kinds}:
            raise ValueError(f"{key} is {json.dumps(value, default=str)}, which is not a value of its type")
        elif key in several and value:
            flags += [f"--{key}", *map(str, value)]
        else:
            parser.set_defaults_with_config(**{key: value})
    return flags


def unknown_setting(key: str, known: set[str], flag: bool = True) -> str:
    """The error message for a setting that does not exist."""
    if not flag:
        return f"{key!r} is neither a flag nor the value of one"
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"unknown setting {key}" + (f"; did you mean {near[0]}?" if near else "")


def launch(own: Sequence[str], flags: Sequence[str]) -> int:
    """Run the same command in every process that accelerate starts."""
    parser = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"after --: {message}")

    parser.error = refuse
    options = parser.parse_args([*flags, "-m", "depo_gateway.training", "rl", *own])
    os.environ[PROCESSES_VARIABLE] = str(options.num_processes or 1)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes report their own errors
    try:
        launch_command(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return 2 if failure.exitcode == 2 else 1
    except subprocess.CalledProcessError as error:
        return 2 if error.returncode == 2 else 1
    except (SignalException, KeyboardInterrupt):  # the processes got the signal too, and saved
        return 1
    return 0


def train_policy(arguments: RlArguments, config: DepoConfig, model: ModelConfig) -> int:
    """Load, train, save, and print a summary. Returns the exit code."""
    if config.n_gpu > 1:
        raise ValueError(f"{config.n_gpu} GPUs are visible; add: -- --num_processes {config.n_gpu}")
    requested = int(os.environ.get(PROCESSES_VARIABLE) or config.world_size)
    if requested > config.world_size:  # as accelerate launch --cpu does
        raise ValueError(
            f"{requested} processes were requested, but accelerate started {config.world_size}; on CPU start them with "
            f"torchrun --nproc-per-node {requested} -m depo_gateway.training rl"
        )
    output = Path(config.output_dir)
    whole = run_state.resumable(output)
    if whole and not arguments.resume:
        raise ValueError(f"{output} contains a run ({whole[-1].name}); add --resume, or set another output_dir")
    with ExitStack() as stack:
        started = time.monotonic()
        try:
            metrics = serve_metrics(arguments, config, stack)
            trainer = build_trainer(arguments, config, model, stack)
            if metrics is not None:
                run_metrics.MetricsCallback(metrics, trainer)
            with interruptible(trainer):
                trainer.train(resume_from_checkpoint=arguments.resume or None)
            if not trainer.stopped:
                trainer.save_model(str(output))
        except (RewardError, SelectionRuleError) as error:
            return report_failure(f"{error}; {resume_hint(output)}", 2)
        except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
            return report_failure(str(error), 1)
        except KeyboardInterrupt:
            return report_failure(f"interrupted; {resume_hint(output)}", 1)
    trainer.accelerator.end_training()  # every rank leaves the process group
    if trainer.stopped:
        return report_failure(f"interrupted; {resume_hint(output)}", 1) if trainer.accelerator.is_main_process else 1
    if trainer.accelerator.is_main_process:
        sys.stdout.write(run_summary(trainer, output, time.monotonic() - started))
    return 0


def serve_metrics(arguments: RlArguments, config: DepoConfig, stack: ExitStack) -> run_metrics.RunMetrics | None:
    """The metrics, served at `metrics_listen` until `stack` is closed; None without it and on ranks above 0."""
    if arguments.metrics_listen is None or config.process_index:
        return None
    metrics = run_metrics.RunMetrics(__version__)
    port = stack.enter_context(run_metrics.metrics_endpoint(arguments.metrics_listen, metrics))
    host = arguments.metrics_listen.rpartition(":")[0]
    sys.stderr.write(f"depo-train rl: metrics on http://{host}:{port}/metrics\n")
    return metrics


def build_trainer(arguments: RlArguments, config: DepoConfig, model: ModelConfig, stack: ExitStack) -> DepoTrainer:
    """The trainer. `stack` closes its reward functions. Raises ValueError for what cannot be loaded."""
    rewards = [
        stack.enter_context(closing(reward_function(name, "answer", arguments.reward_deadline_s)))
        for name in arguments.reward
    ]
    name = str(model.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    rows = dataset.read_rows(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
    with config.main_process_first(desc="preparing the prompts"):
        rows = dataset.prepare_rows(
            rows,
            arguments.prompt_column,
            arguments.answer_column,
            arguments.system_prompt,
            bool(tokenizer.chat_template) and not arguments.plain_prompts,
        )
        if not config.process_index and "answer" in rows.column_names:
            for reward in rewards:
                if isinstance(reward, PairReward):
                    reward.check_references(rows["answer"])
    given = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    quantized = get_quantization_config(model)
    if quantized is not None:
        given |= {"quantization_config": quantized}
    config.model_init_kwargs = {**given, **(config.model_init_kwargs or {})}
    try:
        return DepoTrainer(
            model=name,
            reward_funcs=rewards,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
        )
    except (ImportError, ConnectionError) as error:  # vLLM, or its server
        raise ValueError(str(error)) from None
    except OSError as error:
        raise ValueError(f"model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


@contextmanager
def interruptible(trainer: DepoTrainer) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM end the run at the end of the generation with a checkpoint; repeated, at once."""
    first = math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if trainer.stopping and time.monotonic() - first > REPEAT_SECONDS:
            raise KeyboardInterrupt
        if not trainer.stopping and trainer.accelerator.is_main_process:
            sys.stderr.write("depo-train rl: stopping at the end of this generation; repeat to stop at once\n")
        first, trainer.stopping = min(first, time.monotonic()), True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_hint(output: Path) -> str:
    """How to resume the run."""
    places = run_state.resumable(output)
    return f"--resume continues from {places[-1]}" if places else f"there is no checkpoint in {output} yet"


def report_failure(why: str, code: int) -> int:
    """Print the reason in one line. Returns the exit code."""
    sys.stderr.write(f"depo-train rl: {' '.join(why.split())}\n")
    return code


def run_summary(trainer: DepoTrainer, output: Path, seconds: float) -> str:
    """What the run wrote, and how to route by its estimator."""
    text = f"{output}: the policy after {trainer.state.global_step} steps, {trainer.completions} completions, "
    text += f"{seconds:.0f} s\n"
    place = trainer.export()
    if place is not None:
        text += f"{place}: the estimator, for the gateway to route by\n"
        text += (
            f"Next, set in gateway.yaml: estimator: {{path: {place}}}, routing: {{rule: difficulty}}, the policy as "
        )
        text += f"the first pool, and a routing.threshold; {large_shares(place)}\n"
    return text


def large_shares(place: Path) -> str:
    """The large share that thresholds give on the prompts last rolled out, by the checkpoint's own curve."""
    curve = calibration.loads((checkpoint.resolve(place) / checkpoint.CALIBRATION).read_bytes())
    shares = ", ".join(f"{at}: {curve.large_share('difficulty', at):.0%}" for at in (0.3, 0.5, 0.7, 0.85))
    return f"share of the prompts last rolled out that the large pool would serve, by threshold: {shares}"
