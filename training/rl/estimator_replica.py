"""DepoTrainer's estimator: the same on every rank, whatever else loads and shards the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from depo_gateway.estimator.learner import WHOLE, Learner
from depo_gateway.estimator.model import create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.config import DepoConfig

SAMPLE = 1024  # prompts that tell a wide part which words are rare, and linear heads how a frozen encoder scales


def new(args: DepoConfig, text: TextConfig, prompts: Sequence[str], accelerator: Accelerator) -> Learner:
    """A fresh one on the policy's device; nothing of it is wrapped or belongs to the policy.

    The global random state stays, so a policy samples alike with and without one.
    """
    config = args.learner()
    with plain_loading(args), torch.random.fork_rng(devices=[]):
        model, tokenizer = create_model(args.estimator(text), rounded=config.train_layers != WHOLE, seed=args.seed)
    learner = Learner(model.to(accelerator.device), tokenizer, config, args.seed)
    frozen = not learner.trained
    if args.depo_wide or (frozen and not args.depo_trunk):
        learner.fit_statistics(learner.items([Example(prompt, {}) for prompt in prompts[:SAMPLE]]))
    if not frozen and not args.depo_trunk:  # embeddings that will move can't be scaled by how they were
        learner.model.embedding_mean.zero_()
        learner.model.embedding_scale.fill_(1.0)
    share(learner, accelerator)  # with FSDP's sparing loading only rank 0 has the weights
    return learner


def share(learner: Learner, accelerator: Accelerator) -> None:
    """Rank 0's weights for all: the same sums on two GPUs may differ in the last bit, and would drift apart."""
    if accelerator.num_processes > 1:
        for tensor in (*learner.model.parameters(), *learner.model.buffers(), *learner.average):
            broadcast(tensor.detach())


@contextmanager
def plain_loading(args: DepoConfig) -> Iterator[None]:
    """While it lasts, from_pretrained loads a model whole, on every rank: DeepSpeed's ZeRO-3 would share it out."""
    plugin = getattr(args, "deepspeed_plugin", None)
    config = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
