"""DepoTrainer: TRL's GRPOTrainer with prompts chosen before the rollout (DEPO) and DAPO's dynamic sampling.

TRL's sampler only sets the pace: when a generation is due, its rows are replaced by the rows that the selector chooses
at that moment. So a choice is never stale, the number of steps and the learning rate's schedule are TRL's, and a
resumed run needs no state of the data loader. Each generation goes through four stages:

    take tickets -> generate and grade (TRL); with dynamic sampling, again for more -> losses (TRL), which also yield
    the log-probabilities -> report the groups, step: the selector learns from them

All ranks choose from the same numbers: each scores its share of the candidates and the scores are gathered, the
selector's random numbers follow from one seed, and a digest of each choice is compared.

Shapes: B rows of a micro-batch, R rows of this rank in a generation, P prompts, G rollouts a group, T tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from depo_gateway.training.rewards.worker_pool import RewardError
from depo_gateway.training.rl import dynamic_sampling, estimator_replica, run_state
from depo_gateway.training.rl.config import DepoConfig, check_data
from depo_gateway.training.rl.dynamic_sampling import Round
from depo_gateway.training.rl.missing_rewards import GuardedReward, for_trl, guarded_rewards
from depo_gateway.training.rl.prompt_text import Prompts, text_config
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.guarded_rule import SelectionRuleError
from depo_gateway.training.rl.tickets import PromptSelector, Ticket, tickets_digest

# logged as they are at the end of a logging window; of all others TRL logs the mean over the window
TOTALS = frozenset({"depo/completions", "depo/epoch", "depo/rollouts_saved_estimate", "depo/false_reject_rate"})


class DepoTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with a selector. Takes its arguments; `args` is a DepoConfig, `train_dataset` has rows.

    Args:
        selector: chooses the prompts instead of the selection that `args` describes. Its state must be values for JSON,
            and on several processes each needs its own, which choose alike.

    Attributes:
        selector, learner: the selection and its estimator (None with depo off).
        stopping: set it to save and stop at the end of the generation.
        stopped: whether that has happened.
        on_metrics: called with the metrics of each generation and of each step of the selector.

    Raises:
        ValueError: settings or data that do not fit together.
    """

    args: DepoConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: DepoConfig | None = None,
        train_dataset: Dataset | None = None,
        selector: PromptSelector | None = None,
        **others: Any,
    ) -> None:
        args = DepoConfig(output_dir="depo") if args is None else args
        check_data(args, train_dataset, others)
        if selector is not None and (args.depo != "off" or args.selection_rule):
            raise ValueError(
                "a selector is given, so args must not choose one: leave depo off and selection_rule unset"
            )
        super().__init__(
            model=model, reward_funcs=guarded_rewards(reward_funcs), args=args, train_dataset=train_dataset, **others
        )
        if args.dynamic_sampling and self.tools:
            raise ValueError("dynamic_sampling can't merge generations with tools; turn it off")
        text = text_config(self._tokenizer, self.chat_template_kwargs, args.depo_max_tokens)
        self.prompts = Prompts(self.train_dataset, text)
        self.learner = None
        if args.depo != "off":
            self.learner = estimator_replica.new_replica(args, text, self.prompts, self.accelerator)
        self.selector: PromptSelector = selector or Selector(
            self.prompts, args.selection(), self.learner, args.seed, score=self._scores
        )
        self.completions = 0  # generated so far, by all ranks
        self.stopping = self.stopped = False
        self.on_metrics: Callable[[Mapping[str, float]], None] | None = None
        self._rounds: list[Round] = []  # of the current generation
        self._trained: list[int] = []  # those of their groups that the policy is trained on
        self._log_probs_R = torch.empty(0)  # mean token log-probability; NaN: not known yet
        self._rewards: tuple[tuple[float, ...], ...] = ()  # of the last round, all ranks' groups
        self._seconds = 0.0  # of the last generation, the choice of its prompts included
        self._captured: Tensor | None = None
        self._warned = False
        self._saved = -1  # step of the newest checkpoint
        self._stepped = 0  # _step when the policy last took a step
        self._exported = -1  # step of the newest export
        self.add_callback(GenerationBoundaries(self))

    # --- choosing, generating ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, for the chosen prompts in place of `inputs`; evaluation is not changed."""
        if not self.model.training:
            evaluated: dict[str, Any] = super()._generate_and_score_completions(inputs)
            self._counts()  # so that they do not count for the next generation
            return evaluated
        need, ranks = self.args.prompts_per_generation, self.accelerator.num_processes
        if len(inputs) * ranks != self.args.generation_batch_size:
            raise ValueError(
                f"a generation takes {self.args.generation_batch_size} rows, but the data loader gave {len(inputs)} "
                f"to each of {ranks} processes; leave accelerator_config unset"
            )
        columns = list(inputs[0])
        before = self._snapshot()
        try:
            output = self._generation(need, columns)
        except (RewardError, SelectionRuleError):
            self._restore(before)  # so that train() can write a checkpoint from before the generation
            raise
        self._log_generation()
        output["depo_row"] = torch.arange(len(inputs), device=self.accelerator.device)  # TRL shuffles it along
        self._log_probs_R = torch.full((len(inputs),), float("nan"), device=self.accelerator.device)
        return output

    def _generation(self, need: int, columns: Sequence[str]) -> dict[str, Any]:
        """TRL's output for `need` groups, of as many rounds as dynamic sampling takes."""
        group_size, ranks = self.args.num_generations, self.accelerator.num_processes
        began = time.perf_counter()
        self._rounds = [self._round(need, columns)]
        while self.args.dynamic_sampling and len(self._rounds) < self.args.dynamic_sampling_rounds:
            good = sum(sum(each.informative()) for each in self._rounds)
            drawn = sum(len(each.tickets) for each in self._rounds)
            size = dynamic_sampling.next_size(need - good, len(self.train_dataset) - drawn, group_size, ranks)
            if size <= 0:
                break
            self._rounds.append(self._round(size, columns))
        self._trained = dynamic_sampling.trained(self._rounds, need)
        output = self._rounds[0].output
        if self._trained != list(range(need)) or len(self._rounds) > 1:
            outputs = [each.output for each in self._rounds]
            pad_token = self._tokenizer.pad_token_id
            output = dynamic_sampling.merge(outputs, self._trained, group_size, pad_token, self.accelerator)
        self._seconds = time.perf_counter() - began
        return output

    def _snapshot(self) -> tuple[Any, ...]:
        """The state that a generation changes."""
        numbers = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return self.selector.state_dict(), self.completions, self.state.num_input_tokens_seen, *numbers

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        state, self.completions, self.state.num_input_tokens_seen, numbers, of_gpus = snapshot
        self.selector.load_state_dict(state)
        torch.set_rng_state(numbers)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)

    def _round(self, count: int, columns: Sequence[str]) -> Round:
        tickets = self.selector.take(count)
        self._compare(tickets)
        rows = [ticket.row for ticket in tickets for _ in range(self.args.num_generations)]
        share = len(rows) // self.accelerator.num_processes
        mine = rows[self.accelerator.process_index * share :][:share]
        examples = {row: self.train_dataset[row] for row in dict.fromkeys(mine)}
        inputs = [{name: examples[row][name] for name in columns} for row in mine]
        output = super()._generate_and_score_completions(inputs)
        self.completions += len(rows)
        return Round(tickets, self._rewards, output)

    def _compare(self, tickets: Sequence[Ticket]) -> None:
        """Raises ValueError on every rank if any chose other prompts, or has other text in their rows."""
        text = "\0".join(self.prompts[ticket.row] for ticket in tickets)
        digests = gather_object([hashlib.sha256(f"{tickets_digest(tickets)}{text}".encode()).hexdigest()[:16]])
        if len(set(digests)) > 1:
            raise ValueError(
                f"the processes chose different prompts ({', '.join(digests)}): they must see the same data set in the "
                "same order, the same seed and the same settings"
            )

    def _scores(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """The estimator's logits (P, K, 2); each rank scores a share of the prompts."""
        assert self.learner is not None
        ranks = self.accelerator.num_processes
        parts = gather_object([self.learner.score(prompts[self.accelerator.process_index :: ranks])])
        logits = np.empty((len(prompts), *parts[0].shape[1:]))
        for rank, part in enumerate(parts):
            logits[rank::ranks] = part
        return logits

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's (all ranks' rows, functions). A completion without any reward has an advantage of 0."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        errors = [f.error for f in self.reward_funcs if isinstance(f, GuardedReward) and f.error]
        if failures := [error for error in gather_object(errors[:1] or [""]) if error]:
            raise RewardError(failures[0])
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        if self.model.training:
            weights = self.reward_weights.to(rewards.device)
            total = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))
            self._rewards = tuple(tuple(group) for group in total.view(-1, group_size).tolist())
            missing = float(total.isnan().float().mean())
            self._metrics["train"]["depo/missing_rewards"].append(missing)
        return for_trl(rewards, group_size)

    # --- learning ---

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._captured = result[0].detach()
        return result

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. Also records the log-probabilities under the policy that generated the completions.

        TRL stores them if the policy has changed since; otherwise they are those of this forward pass.
        """
        self._captured = None
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        log_probs_BT = inputs.get("old_per_token_logps")
        log_probs_BT = self._captured if log_probs_BT is None else log_probs_BT
        if self.model.training and log_probs_BT is not None:
            mask_BT = inputs["completion_mask"].bool()
            if inputs.get("tool_mask") is not None:
                mask_BT = mask_BT & inputs["tool_mask"].bool()
            sums_B = torch.where(mask_BT, log_probs_BT.float(), 0.0).sum(1)
            self._log_probs_R[inputs["depo_row"]] = sums_B / mask_BT.sum(1)  # NaN where every token is masked
        elif self.model.training and self.learner is not None and not self._warned:
            self._warned = True
            run_state.log.warning("use_liger_kernel hides log-probabilities: the estimator learns without them")
        self._captured = None
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; after the last micro-batch of a generation's first pass the selector learns."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        every = self.args.generate_every
        if self._rounds and self._step % every == self.args.steps_per_generation % every:
            self._learn()
        return loss

    def _learn(self) -> None:
        """Report the generation's groups to the selector and let it learn."""
        log_probs = self.accelerator.gather(self._log_probs_R).view(-1, self.args.num_generations).tolist()
        by_number = dict(zip(self._trained, log_probs, strict=True))
        tickets = [ticket for each in self._rounds for ticket in each.tickets]
        rewards = [group for each in self._rounds for group in each.rewards]
        for number, (ticket, group) in enumerate(zip(tickets, rewards, strict=True)):
            self.selector.report(ticket, group, by_number.get(number, ()))
        metrics = dict(self.selector.step())
        if self.learner is not None:
            estimator_replica.share(self.learner, self.accelerator)
        metrics.pop("depo/zero_advantage_share", None)  # logged with the generation, whatever the mode
        self._record_metrics(metrics)
        self._rounds, self._trained = [], []

    def _log_generation(self) -> None:
        flags = [flag for each in self._rounds for flag in each.informative()]
        take_metrics = getattr(self.selector, "take_metrics", None)
        metrics: dict[str, float] = dict(take_metrics()) if take_metrics is not None else {}
        counted = self._counts()
        for name in ("timeouts", "failures", "references", "unreadable"):
            own = torch.tensor([float(sum(c.get(name, 0) for c in counted))], device=self.accelerator.device)
            metrics[f"depo/reward_{name}"] = float(self.accelerator.reduce(own, "sum"))
        self._record_metrics(
            {
                **metrics,
                "depo/zero_advantage_share": 1.0 - sum(flags) / len(flags),  # of all that was generated
                "depo/zero_advantage_trained": 1.0 - sum(flags[n] for n in self._trained) / len(self._trained),
                "depo/rounds": float(len(self._rounds)),
                "depo/seconds_rollout": self._seconds - metrics.get("depo/seconds_scoring", 0.0),
                "depo/completions": float(self.completions),
            }
        )

    def _counts(self) -> list[dict[str, int]]:
        return [f.counts() for f in self.reward_funcs if isinstance(f, GuardedReward)]

    def _record_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            before = [] if name in TOTALS else self._metrics["train"][name]
            self._metrics["train"][name] = [*before, value]
        if self.on_metrics is not None:
            self.on_metrics(metrics)

    # --- training, saving, resuming ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer.train, then the estimator's export. `resume_from_checkpoint`: True for the newest whole checkpoint.

        A run that had taken all its steps is loaded, and no step is taken.
        """
        place = None
        if resume_from_checkpoint:
            where = resume_from_checkpoint
            place = run_state.newest(Path(self.args.output_dir)) if where is True else Path(where)
            self.completions = run_state.restore(place, self.selector, self.learner)
        try:
            result = super().train(resume_from_checkpoint=None if place is None else str(place), **kwargs)
        except run_state.FinishedError:
            result = TrainOutput(self.state.global_step, 0.0, {})
        except (RewardError, SelectionRuleError):
            if self._step == self._stepped and self.state.global_step not in (0, self._saved):
                self._save_checkpoint(self.model_wrapped, None)
            raise
        self.export()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, with the selector's and the estimator's state in depo/. Raises OSError if writing fails."""
        place = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with run_state.writing(place, self.args.should_save):
            if self.args.should_save:
                whole = self._step % self.args.generate_every == 0
                run_state.save(place, self.selector, self.learner, self.completions, whole)
            super()._save_checkpoint(model, trial)
            self.export()
        self._saved = self.state.global_step

    def export(self) -> Path | None:
        """Publish the estimator as a checkpoint for the gateway under output_dir/estimator; only rank 0 does.

        Returns that directory; None where there is no estimator or another rank writes.
        """
        if self.learner is None or not self.accelerator.is_main_process:
            return None
        assert isinstance(self.selector, Selector)  # given selectors have no learner of ours
        step, place = self.state.global_step, Path(self.args.output_dir) / "estimator"
        if step != self._exported:
            with torch.random.fork_rng(devices=[]):  # the exporter draws random numbers, the policy's must not change
                run_state.export(place, step, self.learner, self.selector, self.args.save_total_limit)
            self._exported = step
        return place


class GenerationBoundaries(TrainerCallback):
    """Ensures that saving and stopping fall between two generations, from where a run can resume exactly."""

    def __init__(self, trainer: DepoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        micro_batches = state.save_steps * args.gradient_accumulation_steps
        if args.save_strategy == "steps" and micro_batches % args.generate_every:
            steps = args.generate_every // np.gcd(args.generate_every, args.gradient_accumulation_steps)
            raise ValueError(
                f"save_steps is {state.save_steps}, in the middle of a generation, where a run cannot be resumed; "
                f"use a multiple of {steps}"
            )
        self.trainer._saved = state.global_step
        if state.global_step >= state.max_steps:  # Trainer would take another step
            raise run_state.FinishedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._stepped = trainer._step
        if trainer._step % args.generate_every:
            return
        stopping = torch.tensor([float(trainer.stopping)], device=trainer.accelerator.device)
        if float(trainer.accelerator.reduce(stopping, "sum")):  # of any rank
            trainer.stopped = control.should_save = control.should_training_stop = True
