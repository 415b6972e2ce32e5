"""DepoTrainer on TRL's own training path, with a policy of a few thousand weights on CPU."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import CHAT, extract_text
from depo_gateway.gateway import scoring
from depo_gateway.training.rl.config import DepoConfig
from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.prompt_stream import PromptStream
from depo_gateway.training.rl.tickets import InFlight, Ticket
from depo_gateway.training.rl.trainer import DepoTrainer
from tests.training.rl import policy

# deprecations between TRL and transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SMALL: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6, "logging_steps": 1,
    "save_strategy": "no", "learning_rate": 1e-3, "max_steps": 3, "seed": 7, "beta": 0.0,
}  # fmt: skip
ESTIMATOR = {"depo_trunk": False, "depo_max_tokens": 32, "depo_encoder_learning_rate": 3e-3}


def trainer(place: Path, encoder: Path | None = None, reward: Any = policy.reward, **settings: Any) -> DepoTrainer:
    dataset = settings.pop("dataset", None) or policy.prompts()
    chat, selector = settings.pop("chat", False), settings.pop("selector", None)
    if encoder is not None:
        settings = {"depo_encoder": str(encoder), **ESTIMATOR, **settings}
    return DepoTrainer(
        model=policy.model(),
        processing_class=policy.tokenizer(chat),
        args=DepoConfig(output_dir=str(place), **{**SMALL, **settings}),
        reward_funcs=reward,
        train_dataset=dataset,
        selector=selector,
    )


def rows(made: DepoTrainer, key: str = "depo/completions") -> list[dict[str, Any]]:
    """The log's rows of training steps."""
    return [row for row in made.state.log_history if key in row]


def watched(made: DepoTrainer) -> tuple[list[tuple[int, ...]], list[list[Group]]]:
    """The rows of each choice and the groups of each step of the selector, as they come."""
    chosen: list[tuple[int, ...]] = []
    learned: list[list[Group]] = []
    reported: list[Group] = []
    take, report, step = made.selector.take, made.selector.report, made.selector.step

    def taking(count: int) -> Sequence[Ticket]:
        tickets = take(count)
        chosen.append(tuple(ticket.row for ticket in tickets))
        return tickets

    def reporting(ticket: Any, rewards: Sequence[float], log_probs: Sequence[float] = ()) -> bool:
        reported.append(Group(ticket.row, tuple(rewards), tuple(log_probs)))
        return report(ticket, rewards, log_probs)

    def stepping() -> Mapping[str, float]:
        learned.append(list(reported))
        reported.clear()
        return step()

    for name, method in (("take", taking), ("report", reporting), ("step", stepping)):
        setattr(made.selector, name, method)
    return chosen, learned


def kinds(made: DepoTrainer, indices: Sequence[int]) -> str:
    return "".join(policy.kind(made.train_dataset[row]["prompt"]) for row in indices)


def test_plain_grpo_takes_prompts_from_the_stream(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        seen.extend(prompts)
        assert [int(p[3:].split()[1].split("+")[0]) for p in prompts] == [int(a) for a in answer]  # the same row's
        return [0.0] * len(prompts)

    made = trainer(tmp_path, reward=reward)
    made.train()
    order = [made.train_dataset[row]["prompt"] for row in PromptStream(64, 7).draw(12)]
    assert seen == [prompt for prompt in order for _ in range(4)]
    assert [row["depo/completions"] for row in rows(made)] == [16, 32, 48]
    assert all(row["depo/zero_advantage_share"] == 1.0 for row in rows(made))
    assert not (tmp_path / "estimator").exists()


def test_totals_are_logged_as_they_stand(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_steps=2, max_steps=4)
    made.train()
    assert [row["depo/completions"] for row in rows(made)] == [32, 64]


def test_warm_up_keeps_all_and_the_next_generation_filters(tmp_path: Path, tiny_encoder: Path) -> None:
    made = trainer(
        tmp_path, tiny_encoder, depo="faithful", depo_warmup=8, max_steps=12, dataset=policy.prompts(192, "azzm")
    )
    chosen, _ = watched(made)
    made.train()
    log = rows(made)
    assert [row["depo/kept"] for row in log[:8]] == [1.0] * 8
    assert sum(chosen[:8], ()) == tuple(PromptStream(192, 7).draw(32))  # step 8 still keeps all
    assert log[8]["depo/kept"] < 1.0  # and 9 filters
    assert log[8]["depo/scored"] > 4
    assert log[-1]["depo/rollouts_saved_estimate"] > 0


def test_an_estimator_beside_it_does_not_change_the_policy(tmp_path: Path, tiny_encoder: Path) -> None:
    alone = trainer(tmp_path / "off", max_steps=4)
    alone.train()
    both = trainer(tmp_path / "faithful", tiny_encoder, depo="faithful", depo_warmup=99, max_steps=4)
    both.train()
    for name in ("reward", "loss", "grad_norm", "entropy", "num_tokens", "learning_rate"):
        assert [row[name] for row in rows(alone)] == [row[name] for row in rows(both)], name


def test_metrics_stand_in_the_row_of_their_generation(tmp_path: Path, tiny_encoder: Path) -> None:
    made = trainer(tmp_path, tiny_encoder, depo="plus", depo_warmup=2, max_steps=5)
    chosen, observed = watched(made)
    made.train()
    log = rows(made)
    assert len(log) == 5
    for number, row in enumerate(log):
        rewards = [reward for group in observed[number] for reward in group.rewards]
        assert row["depo/pass_rate"] == pytest.approx(sum(rewards) / len(rewards))
        assert row["reward"] == pytest.approx(row["depo/pass_rate"])  # TRL's own, of the same rollouts
        assert tuple(group.row for group in observed[number]) == chosen[number]
        dull = sum(len(set(group.rewards)) == 1 for group in observed[number])
        assert row["depo/zero_advantage_share"] == dull / 4
        assert {"depo/seconds_scoring", "depo/seconds_updating", "depo/calibration_error"} <= set(row)
    assert made.learner is not None
    assert made.learner.steps == 5 * 2  # plus makes two updates a generation


@pytest.mark.parametrize(
    ("settings", "generations"),
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, 4),
        ({"steps_per_generation": 2, "per_device_train_batch_size": 8}, 2),
        ({"num_iterations": 2}, 2),
        ({"steps_per_generation": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2),
    ],
)
def test_log_probabilities_are_of_the_first_pass_and_of_the_right_rows(
    tmp_path: Path, tiny_encoder: Path, settings: dict[str, Any], generations: int
) -> None:
    said: dict[str, list[list[int]]] = defaultdict(list)

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            said[prompt].append(list(ids))
        return policy.reward(prompts, completions)  # type: ignore[return-value]

    made = trainer(
        tmp_path, tiny_encoder, reward, depo="faithful", temperature=0.7, max_steps=4, learning_rate=1e-2, **settings
    )
    _, observed = watched(made)
    made.train()
    assert len(observed) == generations
    for group in observed[0]:
        prompt = made.train_dataset[group.row]["prompt"]
        assert len(group.log_probs) == len(said[prompt]) == 4
        for ids, found in zip(said[prompt], group.log_probs, strict=True):
            asked = policy.tokenizer()(prompt)["input_ids"]
            with torch.no_grad():
                logits = policy.model()(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1] / 0.7
            tokens = torch.tensor(ids)[:, None]
            wanted = torch.log_softmax(logits, -1).gather(1, tokens).mean()
            assert found == pytest.approx(float(wanted), abs=1e-4)
    assert made.learner is not None
    assert made.learner.steps == generations


def test_a_completion_without_reward_has_no_advantage(tmp_path: Path, tiny_encoder: Path) -> None:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        given: list[float | None] = [1.0, 0.0, None, 1.0] * (len(prompts) // 4)
        given[-4:] = [None] * 4  # and a group without any
        return given

    made = trainer(tmp_path, tiny_encoder, reward, depo="faithful", max_steps=1)
    _, observed = watched(made)
    made.train()
    advantages = torch.tensor(list(made._logs["advantages"])).view(4, 4)
    assert (advantages[:3, 2] == 0).all()
    assert (advantages[3] == 0).all()
    assert (advantages[:3, [0, 3]] > 0).all()
    assert math.isnan(observed[0][0].rewards[2])
    assert rows(made)[0]["depo/missing_rewards"] == 7 / 16
    assert rows(made)[0]["depo/pass_rate"] == pytest.approx(2 / 3)  # of those there are


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, dynamic_sampling=True, max_steps=3, dataset=policy.prompts(192), steps_per_generation=2,
        gradient_accumulation_steps=2, per_device_train_batch_size=8, dynamic_sampling_rounds=40,
    )  # fmt: skip
    chosen, observed = watched(made)
    made.train()
    for row in rows(made):
        assert row["depo/zero_advantage_trained"] == 0.0
        assert row["depo/rounds"] > 1
    assert rows(made)[-1]["depo/completions"] == 4 * sum(len(indices) for indices in chosen)
    assert sum(len(groups) for groups in observed) == sum(len(indices) for indices in chosen)  # all is observed
    tokens = policy.tokenizer()
    held = list(made._buffered_inputs)
    advantages: dict[str, list[float]] = defaultdict(list)
    for batch in held:
        assert batch["num_items_in_batch"] == sum(int(b["completion_mask"].sum()) for b in held)
        for ids, mask, advantage in zip(batch["prompt_ids"], batch["prompt_mask"], batch["advantages"], strict=True):
            assert (ids[mask == 0] == tokens.pad_token_id).all()
            advantages[str(tokens.decode(ids[mask == 1]))].append(float(advantage))
    assert {len(group) for group in advantages.values()} == {4}
    assert all(prompt.startswith("m") and abs(sum(group)) < 1e-4 for prompt, group in advantages.items())


def test_dynamic_sampling_goes_on_with_what_there_is(tmp_path: Path) -> None:
    made = trainer(tmp_path, dynamic_sampling=True, dynamic_sampling_rounds=3, dataset=policy.prompts(64, "az"))
    made.train()
    assert [row["depo/rounds"] for row in rows(made)] == [3.0] * 3
    assert [row["depo/zero_advantage_trained"] for row in rows(made)] == [1.0] * 3
    assert [row["depo/completions"] for row in rows(made)] == [48, 96, 144]


def test_dynamic_sampling_ends_with_the_data_set(tmp_path: Path) -> None:
    made = trainer(tmp_path, dynamic_sampling=True, dataset=policy.prompts(6, "az"), max_steps=2)
    made.train()
    assert [row["depo/completions"] for row in rows(made)] == [24, 48]  # each prompt once a step


def test_the_estimator_is_a_checkpoint_that_runs(tmp_path: Path, tiny_encoder: Path) -> None:
    made = trainer(
        tmp_path, tiny_encoder, depo="plus", depo_warmup=1, max_steps=4, chat=True, dataset=policy.prompts(chat=True)
    )
    made.train()
    root = tmp_path / "estimator"
    place = checkpoint.resolve(root)
    assert place.name == "step-4"
    runtime = Runtime.load(place)
    assert runtime.pools == ("policy",)
    assert runtime.manifest.text.template == CHAT
    messages = policy.prompts(1, chat=True)[0]["prompt"]
    text, context = extract_text(runtime.manifest.text, messages)
    assert text == "user: a: easy 000+59= = " == made.prompts[0]
    assert made.learner is not None
    direct = made.learner.score([text])[0, 0]
    assert runtime.full_logits([runtime.prepare(text, context)])[0] == pytest.approx(direct, abs=1e-3)
    assert runtime.calibration.stages["full"]["quality"][0].slope > 0
    assert "difficulty" in runtime.calibration.curves
    assert scoring.load_runtime(str(root), ("small", "large"), "difficulty")[1] == {"small": 0}  # the gateway takes it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depo": "fast"}, "depo is 'fast'; use one of off, faithful, plus"),
        ({"depo_warmup": 5}, "depo_warmup is 5, but depo is off; set depo to faithful or plus"),
        ({"depo_ranking_weight": 0.0}, "depo_ranking_weight is 0.0, but depo is off"),
        ({"depo_trunk": False}, "depo_trunk is False, but depo is off"),
        ({"depo": "plus", "depo_rule": "off"}, "depo_rule is off, but depo is plus; for no selection set depo to off"),
        ({"depo": "plus", "depo_low": 0.1}, "depo_low is 0.1, but the rule is informative"),
        ({"depo": "faithful", "depo_candidates": 2.0}, "depo_candidates is 2.0, but the rule is band"),
        ({"depo": "plus", "depo_trunk": False, "depo_learning_rate": 1e-3}, "depo_learning_rate is 0.001, but depo_tr"),
        ({"depo": "faithful", "depo_low": 0.9}, "depo_low below depo_high"),
        ({"dynamic_sampling_rounds": 0}, "it must be 1 or more"),
        ({"shuffle_dataset": False}, "shuffle_dataset is false"),
        ({"dataset": policy.prompts(3)}, "train_dataset has 3 prompts, but one generation takes 4"),
        ({"dataset": policy.prompts(9).to_iterable_dataset()}, "must be a data set with rows"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config sets dispatch_batches"),
        ({"dynamic_sampling": True, "scale_rewards": "batch"}, "depend on one group alone"),
        ({"dynamic_sampling": True, "dataset": policy.prompts(9).add_column("image", [0] * 9)}, "merge generations"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **settings)


class Newest:
    """The smallest PromptSelector: the data set from its end, in order."""

    def __init__(self, size: int) -> None:
        self.size = self.row = size
        self.reported: dict[int, tuple[float, ...]] = {}
        self.steps = 0

    def take(self, count: int) -> list[Ticket]:
        self.row -= count
        return [Ticket(row, row, self.steps) for row in range(self.row, self.row + count)]

    def report(self, ticket: Ticket | int, rewards: Sequence[float], log_probs: Sequence[float] = ()) -> bool:
        assert isinstance(ticket, Ticket)
        assert len(rewards) == len(log_probs) == 4
        self.reported[ticket.row] = tuple(rewards)
        return True

    def release(self, ticket: Ticket | int) -> bool:
        return False

    def expire(self, steps: int) -> int:
        return 0

    def step(self) -> dict[str, float]:
        self.steps += 1
        return {"depo/row": float(self.row)}

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], in_flight: InFlight = "again") -> None:
        self.row, self.steps = state["row"], state["steps"]


def test_any_prompt_selector_can_be_given(tmp_path: Path) -> None:
    made = trainer(tmp_path, selector=Newest(64), save_strategy="steps", save_steps=2, max_steps=2)
    made.train()
    resumed = trainer(tmp_path, selector=Newest(64), save_strategy="steps", save_steps=2, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert isinstance(made.selector, Newest)
    assert isinstance(resumed.selector, Newest)
    assert sorted(made.selector.reported) == list(range(56, 64))
    assert sorted(resumed.selector.reported) == list(range(52, 56))
    assert [row["depo/row"] for row in rows(resumed)] == [60, 56, 52]
    with pytest.raises(ValueError, match="a selector is given, so args must not choose one"):
        trainer(tmp_path, selector=Newest(64), depo="plus")


def test_a_selector_whose_state_is_no_json_is_told(tmp_path: Path) -> None:
    class Unsaved(Newest):
        def state_dict(self) -> dict[str, Any]:
            return {"row": torch.tensor(self.row)}

    made = trainer(tmp_path, selector=Unsaved(64), save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="the state of the selector Unsaved cannot be saved as JSON"):
        made.train()


def test_the_encoder_learns_at_a_fifth_of_the_trunks_rate(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"depo": "plus", "depo_learning_rate": 1e-3, **SMALL}
    assert DepoConfig(str(tmp_path), **settings).learner().encoder_learning_rate == pytest.approx(2e-4)
    settings["depo_encoder_learning_rate"] = 1e-5
    assert DepoConfig(str(tmp_path), **settings).learner().encoder_learning_rate == 1e-5


def test_a_save_in_the_middle_of_a_generation_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, num_iterations=2, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match=r"save_steps is 3, in the middle of a generation.*use a multiple of 2"):
        made.train()


class Counting:
    """A reward function that counts every completion as a failure."""

    failures = 0

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> Any:
        self.failures += len(completions)
        return policy.reward(prompts, completions)

    def counts(self) -> dict[str, int]:
        counts, self.failures = {"failures": self.failures}, 0
        return counts


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    reward = Counting()
    held_out = Dataset.from_list(list(policy.prompts(4, seed=1)))
    made = DepoTrainer(
        model=policy.model(), processing_class=policy.tokenizer(), reward_funcs=reward,
        args=DepoConfig(
            output_dir=str(tmp_path), **SMALL, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
        ),
        train_dataset=policy.prompts(), eval_dataset=held_out,
    )  # fmt: skip
    chosen, _ = watched(made)
    made.train()
    assert len(chosen) == 3
    assert len(rows(made, "eval_reward")) == 3
    assert [row["depo/completions"] for row in rows(made)] == [16, 32, 48]
    assert [row["depo/reward_failures"] for row in rows(made)] == [16, 16, 16]
