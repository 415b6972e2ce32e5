"""What a forward pass runs in: fp32 whatever the caller set, and dropout from a seed of its own. Torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
