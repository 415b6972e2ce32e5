"""DepoConfig: TRL's GRPOConfig, how prompts are chosen, and the estimator that chooses them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import IterableDataset
from trl import GRPOConfig

from depo_gateway.estimator.learner import FAITHFUL, LearnerConfig
from depo_gateway.estimator.model import ModelConfig
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.selection_config import SelectionConfig

MODES = {"off": SelectionConfig.off, "faithful": SelectionConfig.faithful, "plus": SelectionConfig.plus}
# field of DepoConfig -> field of SelectionConfig, where set
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
# the same for LearnerConfig
LEARNER = {
    "depo_learning_rate": "trunk_learning_rate",
    "depo_encoder_learning_rate": "encoder_learning_rate",
    "depo_train_layers": "train_layers",
    "depo_ranking_weight": "ranking_weight",
    "depo_distillation_weight": "distillation_weight",
}
ESTIMATOR = ("depo_encoder", "depo_layers", "depo_max_tokens", "depo_trunk", "depo_wide")
ENCODER_SHARE = 0.2  # of the trunk's learning rate, the paper's


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DepoConfig(GRPOConfig):  # type: ignore[misc]  # no string annotations: TrlParser reads the types
    """GRPOConfig's fields and ours. None: as the mode `depo` has it (SelectionConfig.faithful and .plus)."""

    depo: str = _option("off", "Choosing prompts before they are rolled out: off, faithful (the paper) or plus.")
    depo_rule: str | None = _option(None, "Selection rule: band or informative.")
    depo_warmup: int | None = _option(None, "Policy generations that keep every prompt and train the estimator.")
    depo_low: float | None = _option(None, "The band's lower end; kept.")
    depo_high: float | None = _option(None, "The band's upper end; kept.")
    depo_explore: float | None = _option(None, "Share of rejected prompts that are rolled out all the same; 0: none.")
    depo_candidates: float | None = _option(None, "Rule informative: so many times the prompts needed are ranked.")
    depo_refill_cap: float | None = _option(
        None,
        "At most so many times the prompts needed are scored, then the best rejects fill up; 0: all of the data set.",
    )
    depo_replay: int | None = _option(None, "Labels kept to be learned from again; 0: none.")
    depo_updates: int | None = _option(None, "Steps of the estimator for each generation of the policy.")
    depo_calibrate: bool | None = _option(None, "Calibrate predictions on recent labels.")
    depo_history: float | None = _option(
        None, "Generations after which a prompt's own outcomes count half; 0: they do not count."
    )
    depo_reward_low: float = _option(0.0, "The reward that counts as 0 for the estimator.")
    depo_reward_high: float = _option(1.0, "The reward that counts as 1 for the estimator.")
    depo_encoder: str = _option("distilbert-base-uncased", "The estimator's encoder: a name or a directory.")
    depo_layers: int = _option(0, "Of the encoder's layers, the first so many; 0: all.")
    depo_max_tokens: int = _option(512, "Tokens of a prompt that the estimator reads.")
    depo_trunk: bool = _option(True, "The paper's trunk of wide layers above the encoder.")
    depo_wide: bool = _option(False, "Words and surface features beside the encoder.")
    depo_learning_rate: float | None = _option(None, "Learning rate of the estimator's trunk and heads.")
    depo_encoder_learning_rate: float | None = _option(None, "Learning rate of the estimator's encoder.")
    depo_train_layers: int | None = _option(None, "Layers of the encoder that learn; -1: all of it.")
    depo_ranking_weight: float | None = _option(None, "Ranking term, times the paper's 3.0; 0: without.")
    depo_distillation_weight: float | None = _option(None, "Distillation term, times the paper's 0.5; 0: without.")
    dynamic_sampling: bool = _option(
        False, "DAPO's: generate for further prompts until the batch is full of groups with a non-zero advantage."
    )
    dynamic_sampling_rounds: int = _option(
        10, "Rounds of generation a batch, at most; then groups of zero advantage fill up."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.depo) == "False":  # what YAML makes of a bare off
            self.depo = "off"
        if self.depo not in MODES:
            raise ValueError(f"depo is {self.depo!r}; use one of {', '.join(MODES)}")
        if self.dynamic_sampling_rounds < 1:
            raise ValueError(f"dynamic_sampling_rounds is {self.dynamic_sampling_rounds}; it must be 1 or more")
        if not self.shuffle_dataset:
            raise ValueError("shuffle_dataset is false, but prompts are chosen from a shuffled stream; remove it")
        self._refuse_idle()
        self.selection()  # raises ValueError for what can't be
        self.learner()

    def _refuse_idle(self) -> None:
        """Raises ValueError for a setting that nothing would read."""
        off, rule = self.depo == "off", self.depo_rule or MODES[self.depo](self.num_generations).rule
        choosing = [ours for ours, name in SELECTION.items() if not name.startswith("reward_")]
        for idle, names, why in (
            (off, (*choosing, *LEARNER, *ESTIMATOR), "depo is off; set depo to faithful or plus"),
            (rule == "off", ("depo_rule",), f"depo is {self.depo}; for no selection set depo to off"),
            (rule != "band", ("depo_low", "depo_high"), f"the rule is {rule}; they are the rule band's"),
            (rule != "informative", ("depo_candidates",), f"the rule is {rule}; it is the rule informative's"),
            (not self.depo_trunk, ("depo_learning_rate",), "depo_trunk is false, so there is no trunk to learn by it"),
        ):
            given = [name for name in names if getattr(self, name) != self.__dataclass_fields__[name].default]
            if idle and given:
                raise ValueError(f"{given[0]} is {getattr(self, given[0])}, but {why}")

    @property
    def prompts_per_generation(self) -> int:
        """Groups that one generation of all ranks holds."""
        return int(self.generation_batch_size // self.num_generations)

    @property
    def generate_every(self) -> int:
        """Micro-batches of one rank between two generations."""
        return int(self.steps_per_generation * self.num_iterations)

    def selection(self) -> SelectionConfig:
        """How prompts are chosen. Raises ValueError for settings that can't be."""
        given = {name: getattr(self, ours) for ours, name in SELECTION.items() if getattr(self, ours) is not None}
        return replace(MODES[self.depo](self.num_generations), **given)

    def learner(self) -> LearnerConfig:
        """How the estimator learns: as in the paper, but for what is set."""
        given = {name: getattr(self, ours) for ours, name in LEARNER.items() if getattr(self, ours) is not None}
        if "trunk_learning_rate" in given:
            given.setdefault("encoder_learning_rate", ENCODER_SHARE * given["trunk_learning_rate"])
        return replace(FAITHFUL, **given)

    def estimator(self, text: TextConfig) -> ModelConfig:
        """The estimator's shape, for prompts that are read as `text` says."""
        pools = self.selection().pools
        return ModelConfig(pools, text, self.depo_encoder, self.depo_layers, wide=self.depo_wide, trunk=self.depo_trunk)


def refuse(args: DepoConfig, train_dataset: Any, others: Mapping[str, Any]) -> None:
    """Raises ValueError for what choosing prompts by row can't work with."""
    if train_dataset is None or isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        raise ValueError("prompts are chosen by row, so train_dataset must be a data set with rows, not a stream")
    need = args.prompts_per_generation
    if len(train_dataset) < need:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, but one generation takes {need}; use a larger data set "
            "or a smaller per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation"
        )
    loading = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(loading, name, None):
            raise ValueError(f"accelerator_config sets {name}, but each process loads its own rows; remove it")
    if args.dynamic_sampling:
        if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "dynamic_sampling needs advantages that are of one group alone: scale_rewards group or none, and "
                "multi_objective_aggregation sum_then_normalize"
            )
        if others.get("environment_factory") or {"image", "images"} & set(train_dataset.column_names):
            raise ValueError("dynamic_sampling can't merge generations with images or environments; turn it off")
