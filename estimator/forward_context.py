"""Context managers for a forward pass: fp32 whatever the caller set, seeded dropout, recomputed activations. Torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

RECOMPUTE_TOKENS = 16_384  # of a batch, padding included: above it, a step recomputes activations


@contextmanager
def recompute_activations(encoder: Any, tokens: int) -> Iterator[None]:
    """Gradient checkpointing for a large batch: only each layer's input is stored, the rest is computed again.

    Without it, 256 prompts of 512 tokens take some 40 GiB beside the policy. It works in training mode only, that is
    with dropout; the masks are the same both times.
    """
    if tokens <= RECOMPUTE_TOKENS or not encoder.supports_gradient_checkpointing:
        yield
        return
    renamed = hasattr(encoder, "activation_checkpointing_enable")  # since transformers 5
    kind = "activation" if renamed else "gradient"
    getattr(encoder, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(encoder, f"{kind}_checkpointing_disable")()


@contextmanager
def fp32(device: torch.device, gradients: bool = False) -> Iterator[None]:
    """With or without gradients, and in fp32, whatever the caller set."""
    # not inference_mode: tensors made in it can't be used in a later step
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def seeded_dropout(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """`model` in training mode, its dropout masks drawn from `seed` (64 bits); in evaluation mode afterwards.

    The global random state is neither read nor changed, so an estimator beside a policy does not change what the policy
    samples. `device` is the model's: the CPU or a CUDA device.
    """
    cuda = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(cuda):
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        model.train()
        try:
            yield
        finally:
            model.eval()
