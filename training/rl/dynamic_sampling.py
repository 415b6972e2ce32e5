"""DAPO's dynamic sampling (arXiv 2503.14476): which groups of several generations make up the training batch.

A round is one call of TRL's generator; a generation is the rounds of one batch. A round's groups are distributed over
the ranks as in TRL: of the whole batch's rows in order, rank r holds the r-th part.

Shapes: P prompts, G rollouts a group, R rows of this rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from depo_gateway.training.rl.group_labels import has_advantage
from depo_gateway.training.rl.tickets import Ticket

# TRL's outputs that can be merged, by the side they are padded on, with the padding; PLAIN has no token axis
LEFT = {"prompt_ids": None, "prompt_mask": 0}  # None: the tokenizer's padding token
RIGHT = {
    "completion_ids": None, "completion_mask": 0, "tool_mask": 1, "old_per_token_logps": 0.0,
    "ref_per_token_logps": 0.0, "sampling_per_token_logps": 0.0, "importance_sampling_ratio": 1.0,
}  # fmt: skip
PLAIN = ("advantages",)
TOTAL = "num_items_in_batch"


@dataclass(frozen=True, slots=True)
class Round:
    """One call of TRL's generator.

    `rewards`: all ranks' P groups of G, NaN where there is none. `output`: TRL's, of this rank.
    """

    tickets: Sequence[Ticket]
    rewards: tuple[tuple[float, ...], ...]
    output: dict[str, Any]

    def informative(self) -> list[bool]:
        """Whether each group's rewards differ."""
        return [has_advantage(rewards) for rewards in self.rewards]


def trained(rounds: Sequence[Round], need: int) -> list[int]:
    """The groups of the training batch, numbered over all rounds: first those with an advantage, then others."""
    flags = [flag for each in rounds for flag in each.informative()]
    good = [number for number, flag in enumerate(flags) if flag]
    rest = [number for number, flag in enumerate(flags) if not flag]
    return (good + rest)[:need]


def next_size(missing: int, left: int, group_size: int, ranks: int) -> int:
    """Prompts to draw for `missing` groups, at most `left`, rounded so that all ranks get equally many rows."""
    step = ranks // gcd(ranks, group_size)
    return min(-(-missing // step), left // step) * step


def merge(
    outputs: Sequence[Mapping[str, Any]],
    groups: Sequence[int],
    group_size: int,
    pad_token: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """This rank's rows of the batch made of `groups`, numbered over all outputs. Collective: call it on every rank.

    Raises ValueError for outputs that can't be merged, such as images.
    """
    known = {*LEFT, *RIGHT, *PLAIN, TOTAL}
    odd = sorted({key for output in outputs for key, value in output.items() if value is not None} - known)
    if odd:
        raise ValueError(f"dynamic_sampling can't merge generations that carry {odd[0]}; turn it off for this data")
    share = len(groups) * group_size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    rows = torch.tensor([group * group_size + i for group in groups for i in range(group_size)][mine])
    merged: dict[str, Any] = {}
    for key in outputs[0]:
        if key == TOTAL or outputs[0][key] is None:
            continue
        fill = {**LEFT, **RIGHT}.get(key, 0)
        fill = pad_token if fill is None else fill
        parts = [_gathered(output[key], fill, key in LEFT, accelerator) for output in outputs]
        width = max(part.shape[-1] for part in parts)
        if parts[0].ndim > 1:
            parts = [_padded(part, width, fill, key in LEFT) for part in parts]
        merged[key] = torch.cat(parts)[rows.to(parts[0].device)]
    mask = merged["completion_mask"] * merged["tool_mask"] if "tool_mask" in merged else merged["completion_mask"]
    # TRL's divisor of the token-mean loss; not 0 even if every completion is masked as truncated
    merged[TOTAL] = accelerator.gather(mask.sum()).sum().clamp_min(1)
    return merged


def _gathered(rows: Tensor, fill: float, left: bool, accelerator: Accelerator) -> Tensor:
    if rows.ndim > 1:
        rows = accelerator.pad_across_processes(rows, dim=1, pad_index=fill, pad_first=left)
    everywhere: Tensor = accelerator.gather(rows)
    return everywhere


def _padded(rows_RT: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - rows_RT.shape[1]
    return torch.nn.functional.pad(rows_RT, (missing, 0) if left else (0, missing), value=fill)
