"""DepoTrainer's estimator: replicated on every rank, however the policy is loaded and sharded."""

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

STATISTICS_PROMPTS = 1024  # read for the wide part's word rarities and the scale of a frozen encoder's embeddings


def new_replica(args: DepoConfig, text: TextConfig, prompts: Sequence[str], accelerator: Accelerator) -> Learner:
    """A new estimator and its optimizers on the policy's device; accelerate wraps none of it.

    The global random state does not change, so the policy samples the same completions with and without an estimator.
    """
    config = args.learner()
    with plain_loading(args), torch.random.fork_rng(devices=[]):
        model, tokenizer = create_model(args.estimator(text), rounded=config.train_layers != WHOLE, seed=args.seed)
    learner = Learner(model.to(accelerator.device), tokenizer, config, args.seed)
    frozen = not learner.trained
    if args.depo_wide or (frozen and not args.depo_trunk):
        learner.fit_statistics(learner.items([Example(prompt, {}) for prompt in prompts[:STATISTICS_PROMPTS]]))
    if not frozen and not args.depo_trunk:  # embeddings that will change can't be standardised by their first values
        learner.model.embedding_mean.zero_()
        learner.model.embedding_scale.fill_(1.0)
    share(learner, accelerator)  # with FSDP's memory-saving loading only rank 0 has the weights
    return learner


def share(learner: Learner, accelerator: Accelerator) -> None:
    """Broadcast rank 0's weights: sums on two GPUs may differ in the last bit, and the replicas would drift apart."""
    if accelerator.num_processes > 1:
        for tensor in (*learner.model.parameters(), *learner.model.buffers(), *learner.average):
            broadcast(tensor.detach())


@contextmanager
def plain_loading(args: DepoConfig) -> Iterator[None]:
    """Within it, from_pretrained loads the whole model on every rank, where DeepSpeed's ZeRO-3 would shard it."""
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
