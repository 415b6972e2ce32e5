"""What a forward pass runs in: fp32 whatever the caller set, and dropout from a seed of its own. Torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MANY = 16_384  # tokens of a batch, padding too: beyond, a step keeps no layer's activations


@contextmanager
def sparing(encoder: Any, tokens: int) -> Iterator[None]:
    """Of a large batch's activations only each layer's input is kept; the rest is computed again on the way back.

    256 prompts of 512 tokens would else take some 40 GiB beside the policy. It works in training mode alone, that is
    with dropout, whose masks are drawn alike again.
    """
    if tokens <= MANY or not encoder.supports_gradient_checkpointing:
        yield
        return
    kind = (
        "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    )  # the old name, before 5.x
    getattr(encoder, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(encoder, f"{kind}_checkpointing_disable")()


@contextmanager
def fp32(device: torch.device, gradients: bool = False) -> Iterator[None]:
    """With or without gradients, and in fp32, whatever the caller set."""
    # never inference_mode, though: what is made in it can't be used in a step later
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def dropout(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """`model` in training mode, its dropout masks drawn from `seed` (64 bits); in evaluation mode afterwards.

    The global random state is neither read nor moved: else an estimator beside a policy would change what the policy
    samples. `device` is the model's, the CPU or a CUDA device.
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
