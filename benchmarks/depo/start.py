"""The policy that every method starts from: the demo's small recipe, fine-tuned for 2,500 steps with hardly any `*`.

It is trained once, in three minutes on one core, and stored in a file that all runs load.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from benchmarks.demo_models.chains import RECIPES, answer_of, build_model, build_tokenizer, draw
from benchmarks.depo.policy import Policy

LESSONS = (8.0, 4.0, 0.1)  # the weights of + - * in the fine-tuning prompts
STEPS, BATCH, RATE, SEED = 2500, 64, 3e-3, 0


def start(place: Path, steps: int = STEPS) -> Policy:
    """The policy before reinforcement learning, from the file `place`, which is created if it does not exist."""
    policy = Policy(build_model(RECIPES[0], build_tokenizer()))
    if place.exists():
        safetensors.torch.load_model(policy.model, place)
        return policy
    policy = teach(steps)
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_suffix(".part")
    safetensors.torch.save_model(policy.model, str(unfinished))
    unfinished.replace(place)
    return policy


def teach(steps: int) -> Policy:
    """Supervised fine-tuning from scratch on prompts of the split `sft`: AdamW, one cycle of the learning rate."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    policy = Policy(build_model(RECIPES[0], tokenizer))
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    end = (int(tokenizer.eos_token_id),)
    for _ in tqdm(range(steps), desc="SFT of the start", disable=not sys.stderr.isatty()):
        rows = []
        for _ in range(BATCH):
            prompt = draw(rng, "sft", LESSONS)
            answer = tokenizer.encode(answer_of(prompt), add_special_tokens=False)
            rows.append((tuple(tokenizer.encode(prompt)), (*answer, *end)))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        tokens = sum(len(answer) for _, answer in rows)
        optimizer.zero_grad()
        for half in (rows[: BATCH // 2], rows[BATCH // 2 :]):
            torch.autograd.backward(-policy.log_probs(half).sum() / tokens)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return policy
