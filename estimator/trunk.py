"""The trunk of DEPO's estimator (arXiv 2602.06375): pooled hidden states -> logits, two heads a pool. Torch.

Shapes: B prompts, D encoder width, H = 2K outputs (pool by pool: quality logit, token-confidence logit).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN, OUT, BLOCKS, DROPOUT = 1024, 512, 2, 0.1
TRUNK_DEVIATION, HEAD_DEVIATION = 0.02, 0.001  # of the first weights; heads so small that the first output is about 0.5


class Trunk(nn.Module):
    """Linear-LayerNorm-GELU to 1024, two residual blocks, Linear-LayerNorm-GELU-Dropout to 512, linear heads."""

    def __init__(self, width: int, outputs: int, seed: int = 0) -> None:
        """First weights follow from `seed` alone: every process of a run begins with the same, whatever it drew."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
            self.enter = nn.Sequential(nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU())
            self.blocks = nn.ModuleList(_block() for _ in range(BLOCKS))
            self.leave = nn.Sequential(nn.Linear(HIDDEN, OUT), nn.LayerNorm(OUT), nn.GELU(), nn.Dropout(DROPOUT))
            self.heads = nn.Linear(OUT, outputs)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=HEAD_DEVIATION if module is self.heads else TRUNK_DEVIATION)
                    nn.init.zeros_(module.bias)  # LayerNorms begin at 1 and 0 by themselves

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Pooled hidden states (B, D) -> logits (B, H)."""
        x = self.enter(embedding_BD)
        for block in self.blocks:
            x = nn.functional.gelu(x + block(x))
        logits: Tensor = self.heads(self.leave(x))
        return logits


def _block() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(HIDDEN, HIDDEN),
        nn.LayerNorm(HIDDEN),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, HIDDEN),
        nn.LayerNorm(HIDDEN),
    )
