"""The program that test_trainer_ranks.py runs on every rank: arguments are a directory for results and an encoder."""

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from depo_gateway.training.rewards.worker_pool import RewardError
from depo_gateway.training.rl.config import DepoConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.trainer import DepoTrainer
from tests.training.rl import policy


def broken(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
    """Fails on rank 1 alone, in the third generation."""
    broken.calls = getattr(broken, "calls", 0) + 1  # type: ignore[attr-defined]
    if torch.distributed.get_rank() == 1 and broken.calls == 3:  # type: ignore[attr-defined]
        raise RewardError("the reward function broke")
    return policy.reward(prompts, completions)


def run(
    name: str, out: Path, encoder: str, off_by: int = 0, reward: Any = policy.reward, **settings: Any
) -> dict[str, Any]:
    """Train. Returns what this rank chose and ended with. `off_by`: added to the stream's seed on rank 1."""
    args = DepoConfig(
        output_dir=str(out / name), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, logging_steps=1,
        save_strategy="no", learning_rate=1e-3, max_steps=4, seed=7, ddp_backend="gloo", depo_encoder=encoder,
        depo_trunk=False, depo_max_tokens=32, **settings,
    )  # fmt: skip
    made = DepoTrainer(
        model=policy.model(), processing_class=policy.tokenizer(), reward_funcs=reward, args=args,
        train_dataset=policy.prompts(),
    )  # fmt: skip
    rank = made.accelerator.process_index
    assert isinstance(made.selector, Selector)
    made.selector.stream.seed += off_by * rank
    assert made.learner is not None
    with torch.no_grad():
        made.learner.model.bias += rank  # as if rounding differed between the ranks
    chosen: list[Any] = []
    take = made.selector.take

    def taking(count: int) -> Any:
        tickets = take(count)
        chosen.append([ticket.row for ticket in tickets])
        return tickets

    made.selector.take = taking  # type: ignore[method-assign]
    error = ""
    try:
        made.train()
    except ValueError as raised:
        error = str(raised)
    held = [] if error else list(made._buffered_inputs)
    decode = made.processing_class.decode
    weights = b"".join(value.numpy().tobytes() for value in made.learner.model.state_dict().values())
    return {
        "world": made.accelerator.num_processes,
        "chosen": chosen,
        "error": error,
        "weights": hashlib.sha256(weights).hexdigest(),
        "state": hashlib.sha256(json.dumps(made.selector.state_dict(), sort_keys=True).encode()).hexdigest(),
        "completions": made.completions,
        "prompts": [decode(row[row != 0]) for batch in held for row in batch["prompt_ids"]],
        "advantages": [round(float(x), 5) for batch in held for x in batch["advantages"]],
        "items": [int(batch["num_items_in_batch"]) for batch in held],
        "tokens": [int(batch["completion_mask"].sum()) for batch in held],
        "trained": [row.get("depo/zero_advantage_trained") for row in made.state.log_history],
    }


def gloo_threads() -> list[str]:
    """Of this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    place, encoder = Path(sys.argv[1]), sys.argv[2]
    found = {
        "plus": run("plus", place, encoder, depo="plus", depo_warmup=1),
        "dapo": run(
            "dapo", place, encoder, depo="faithful", depo_warmup=99, dynamic_sampling=True, dynamic_sampling_rounds=30
        ),
        "broken": run("broken", place, encoder, reward=broken, depo="faithful"),
        "control": run("control", place, encoder, off_by=1, depo="faithful"),
    }
    (place / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # a rank that left early would abort the other
    torch.distributed.destroy_process_group()
    gc.collect()  # trainers are reference cycles with the process group, whose threads abort a normal exit
    assert not gloo_threads()
