"""DepoConfig: TRL's GRPOConfig with the selection of prompts and its estimator."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import IterableDataset
from trl import GRPOConfig

from depo_gateway.estimator.learner import FAITHFUL, LearnerConfig
from depo_gateway.estimator.model import ModelConfig
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selectors.names import rule_class, rule_of

MODES = {"off": SelectionConfig.off, "faithful": SelectionConfig.faithful, "plus": SelectionConfig.plus}
# field of DepoConfig -> field of SelectionConfig that it overrides
SELECTION = {
    "depo_rule": "rule",
    "depo_warmup": "warmup_steps",
    "depo_low": "low",
    "depo_high": "high",
    "depo_explore": "explore",
    "depo_candidates": "candidates",
    "depo_refill_cap": "refill_cap",
    "depo_replay": "replay",
    "depo_updates": "updates",
    "depo_calibrate": "calibrate",
    "depo_history": "history_half_life",
    "depo_reward_low": "reward_low",
    "depo_reward_high": "reward_high",
}
# field of DepoConfig -> field of LearnerConfig that it overrides
LEARNER = {
    "depo_learning_rate": "trunk_learning_rate",
    "depo_encoder_learning_rate": "encoder_learning_rate",
    "depo_train_layers": "train_layers",
    "depo_ranking_weight": "ranking_weight",
    "depo_distillation_weight": "distillation_weight",
}
ESTIMATOR = ("depo_encoder", "depo_layers", "depo_max_tokens", "depo_trunk", "depo_wide")
# the settings that a rule without an estimator may read
WITHOUT_ESTIMATOR = (
    "depo_warmup", "depo_low", "depo_high", "depo_explore", "depo_candidates", "depo_refill_cap", "depo_reward_low",
    "depo_reward_high",
)  # fmt: skip
# field of SelectionConfig in an error message -> the setting that the user knows
SETTING_OF = {name: ours for ours, name in SELECTION.items()} | {"group_size": "num_generations"}
ENCODER_SHARE = 0.2  # of the trunk's learning rate, as in the paper


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DepoConfig(GRPOConfig):  # type: ignore[misc]  # no string annotations: TrlParser reads the types
    """GRPOConfig's fields and ours. None: the value of the mode `depo` (SelectionConfig.faithful and .plus)."""

    depo: str = _option("off", "Estimator that selects prompts before the rollout: off, faithful (the paper) or plus.")
    selection_rule: str | None = _option(
        None,
        "Selection rule instead of the mode's: band or informative (with depo faithful or plus); greso, mopps, polaris "
        "or oracle (with depo off); or a class of yours: module:Class, file.py:Class.",
    )
    selection_rule_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the rule's class: a mapping in YAML, JSON in a flag."}
    )
    depo_rule: str | None = _option(None, "Selection rule instead of the mode's: band or informative.")
    depo_warmup: int | None = _option(None, "Generations that keep every prompt and train the estimator.")
    depo_low: float | None = _option(None, "Lower end of the band, inclusive.")
    depo_high: float | None = _option(None, "Upper end of the band, inclusive.")
    depo_explore: float | None = _option(
        None,
        "Share of the rejected prompts that are rolled out nevertheless, at most half a generation's prompts; they "
        "replace accepted ones; 0: none.",
    )
    depo_candidates: float | None = _option(None, "Rule informative: ranks so many times the prompts needed.")
    depo_refill_cap: float | None = _option(
        None,
        "Scores at most so many times the prompts needed, then fills up with the best rejects; 0: the data set once.",
    )
    depo_replay: int | None = _option(None, "Recent labels that the estimator learns from again; 0: none.")
    depo_updates: int | None = _option(None, "Steps of the estimator for each generation.")
    depo_calibrate: bool | None = _option(None, "Calibrate predictions on recent labels.")
    depo_history: float | None = _option(
        None, "Generations after which a prompt's own outcomes count half; 0: they do not count."
    )
    depo_reward_low: float = _option(0.0, "The reward that counts as 0 for the estimator.")
    depo_reward_high: float = _option(1.0, "The reward that counts as 1 for the estimator.")
    depo_encoder: str = _option("distilbert-base-uncased", "The estimator's encoder: a name or a directory.")
    depo_layers: int = _option(0, "Number of the encoder's layers, from the first; 0: all.")
    depo_max_tokens: int = _option(512, "Tokens of a prompt that the estimator reads.")
    depo_trunk: bool = _option(True, "Put the paper's trunk of wide layers on the encoder.")
    depo_wide: bool = _option(False, "Also read words and surface features.")
    depo_learning_rate: float | None = _option(None, "Learning rate of the estimator's trunk and heads.")
    depo_encoder_learning_rate: float | None = _option(None, "Learning rate of the estimator's encoder.")
    depo_train_layers: int | None = _option(None, "Layers of the encoder that are trained; -1: all of it.")
    depo_ranking_weight: float | None = _option(None, "Weight of the ranking term, times the paper's 3.0.")
    depo_distillation_weight: float | None = _option(None, "Weight of the distillation term, times the paper's 0.5.")
    dynamic_sampling: bool = _option(
        False, "DAPO's: generate for more prompts until the batch is full of groups with a non-zero advantage."
    )
    dynamic_sampling_rounds: int = _option(
        10, "Maximum rounds of generation a batch; then groups without advantage fill up."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depo", "selection_rule"):
            if str(getattr(self, name)) == "False":  # what YAML makes of a bare off
                setattr(self, name, "off")
        if self.depo not in MODES:
            raise ValueError(f"depo is {self.depo!r}; use one of {', '.join(MODES)}")
        if self.dynamic_sampling_rounds < 1:
            raise ValueError(f"dynamic_sampling_rounds is {self.dynamic_sampling_rounds}; it must be 1 or more")
        if not self.shuffle_dataset:
            raise ValueError("shuffle_dataset is false, but prompts are chosen from a shuffled stream; remove it")
        self._read_options()
        self._check_rule()
        self._refuse_unused()
        rule_of(self.selection())  # raises ValueError for settings that do not fit together
        self.learner()

    def _read_options(self) -> None:
        """Raises ValueError for selection_rule_options that are no mapping."""
        given = self.selection_rule_options
        if isinstance(given, str):
            try:
                self.selection_rule_options = given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"selection_rule_options is not JSON: {error}") from None
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"selection_rule_options is {given!r}; it must be a mapping of the rule's arguments")

    def _check_rule(self) -> None:
        """Raises ValueError for a rule that does not fit the mode."""
        if self.selection_rule is None:
            if self.selection_rule_options:
                raise ValueError("selection_rule_options is set, but no selection_rule is named")
            if self.depo_rule not in (None, "off") and not rule_class(self.depo_rule).heads:
                raise ValueError(
                    f"depo_rule is {self.depo_rule}, which uses no estimator; use selection_rule with depo off"
                )
            return
        if self.depo_rule is not None:
            raise ValueError(
                f"selection_rule is {self.selection_rule} and depo_rule is {self.depo_rule}; set only one of them"
            )
        scores = bool(rule_class(self.selection_rule).heads)
        if scores and self.depo == "off":
            raise ValueError(
                f"selection_rule is {self.selection_rule}, which needs an estimator; set depo to faithful or plus"
            )
        if not scores and self.depo != "off":
            raise ValueError(
                f"selection_rule is {self.selection_rule}, which uses no estimator, but depo is {self.depo}; set depo "
                "to off"
            )

    def _refuse_unused(self) -> None:
        """Raises ValueError for a setting that nothing would read."""
        off, rule = self.depo == "off", self._rule()
        kind = rule_class(rule)
        read = {*kind.settings, *kind.reads}
        plain = off and self.selection_rule in (None, "off")
        idle = (*SELECTION, *LEARNER, *ESTIMATOR) if plain else [n for n in SELECTION if n not in WITHOUT_ESTIMATOR]
        unread = f"the rule is {rule}; a class that reads it names it in `reads`"
        for unused, names, why in (
            (plain, idle, "depo is off; set depo to faithful or plus"),
            ("explore" not in read, ("depo_explore",), unread),
            ("refill_cap" not in read, ("depo_refill_cap",), unread),
            (off, (*idle, *LEARNER, *ESTIMATOR), f"the selection rule {self.selection_rule} has no estimator"),
            (self.depo_rule == "off", ("depo_rule",), f"depo is {self.depo}; for no selection set depo to off"),
            ("low" not in read, ("depo_low", "depo_high"), f"the rule is {rule}; they are the rule band's"),
            ("candidates" not in read, ("depo_candidates",), f"the rule is {rule}; it is the rule informative's"),
            (not self.depo_trunk, ("depo_learning_rate",), "depo_trunk is false; it is the learning rate of the trunk"),
        ):
            given = [name for name in names if getattr(self, name) != self.__dataclass_fields__[name].default]
            if unused and given:
                raise ValueError(f"{given[0]} is {getattr(self, given[0])}, but {why}")

    def _rule(self) -> str:
        return self.selection_rule or self.depo_rule or MODES[self.depo](self.num_generations).rule

    @property
    def prompts_per_generation(self) -> int:
        """Groups in one generation of all ranks."""
        return int(self.generation_batch_size // self.num_generations)

    @property
    def generate_every(self) -> int:
        """Micro-batches of one rank between two generations."""
        return int(self.steps_per_generation * self.num_iterations)

    def selection(self) -> SelectionConfig:
        """How prompts are chosen. Raises ValueError for values out of range."""
        given = {name: getattr(self, ours) for ours, name in SELECTION.items() if getattr(self, ours) is not None}
        if self.selection_rule is not None:
            given |= {"rule": self.selection_rule, "options": self.selection_rule_options or {}}
            if self.depo == "off":
                given.setdefault("warmup_steps", 0)  # there is no estimator to train first
        try:
            return replace(MODES[self.depo](self.num_generations), **given)
        except ValueError as error:
            named = re.sub(r"[a-z]\w*", lambda word: SETTING_OF.get(word[0], word[0]), str(error))
            raise ValueError(named) from None

    def learner(self) -> LearnerConfig:
        """How the estimator learns: as in the paper, where nothing else is set."""
        given = {name: getattr(self, ours) for ours, name in LEARNER.items() if getattr(self, ours) is not None}
        if "trunk_learning_rate" in given:
            given.setdefault("encoder_learning_rate", ENCODER_SHARE * given["trunk_learning_rate"])
        return replace(FAITHFUL, **given)

    def estimator(self, text: TextConfig) -> ModelConfig:
        """The estimator's shape, for prompts that are read as `text` says."""
        heads = rule_class(self._rule()).heads
        return ModelConfig(heads, text, self.depo_encoder, self.depo_layers, wide=self.depo_wide, trunk=self.depo_trunk)


def check_data(args: DepoConfig, train_dataset: Any, others: Mapping[str, Any]) -> None:
    """Raises ValueError for a data set or arguments of DepoTrainer that do not work with prompts chosen by row."""
    if train_dataset is None or isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        raise ValueError("train_dataset must be a data set with rows, not a stream: prompts are chosen by row")
    need = args.prompts_per_generation
    if len(train_dataset) < need:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, but one generation takes {need}; use a larger data set "
            "or a smaller per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation"
        )
    loading = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(loading, name, None):
            raise ValueError(f"accelerator_config sets {name}, but each process loads its own rows; remove {name}")
    if args.dynamic_sampling:
        if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "dynamic_sampling requires advantages that depend on one group alone: set scale_rewards to group or "
                "none, and multi_objective_aggregation to sum_then_normalize"
            )
        if others.get("environment_factory") or {"image", "images"} & set(train_dataset.column_names):
            raise ValueError("dynamic_sampling can't merge generations with images or environments; turn it off")
