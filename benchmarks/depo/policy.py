"""The policy: a Llama's weights with sampling and gradients that are fast on one CPU thread, without transformers.

At 0.1M parameters transformers' forward pass spends most of its time outside of matrix products. The functions here
give the same logits (a test compares them). Sampling runs each prompt once for its whole group; finished rows drop out.

Shapes: B rows, T tokens, D hidden, H heads, V vocabulary; P prompts of G completions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, log_softmax, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer: its tokens, with the end token if it was sampled, and their log-probabilities."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


class Policy:
    """A Llama whose parameters are trained in place; fp32."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config: Any = model.config
        self.model = model.float()
        self.heads, self.width = int(config.num_attention_heads), int(config.hidden_size)
        self.eps = float(config.rms_norm_eps)
        self.pad, self.end = int(config.pad_token_id), int(config.eos_token_id)
        angles = torch.arange(512).float()[:, None] * model.model.rotary_emb.inv_freq[None]
        self.cosines, self.sines = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))

    def log_probs(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Log-probabilities of completions given prompts, differentiable; one number a completion token, row by row.

        rows: (prompt, completion), all padded on the right to the longest, so similar lengths should go together.
        """
        lengths = [len(prompt) + len(completion) - 1 for prompt, completion in rows]
        ids = torch.full((len(rows), max(lengths)), self.pad)
        target = torch.full_like(ids, -1)
        for row, ((prompt, completion), length) in enumerate(zip(rows, lengths, strict=True)):
            whole = torch.tensor([*prompt, *completion])
            ids[row, :length] = whole[:-1]
            target[row, len(prompt) - 1 : length] = whole[len(prompt) :]
        time = ids.shape[1]
        x = embedding(ids, self.model.model.embed_tokens.weight)
        for layer in self.model.model.layers:
            q, k, v = self._heads_of(layer, x, self.cosines[:time], self.sines[:time])
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)  # padding is last: no row attends to it
            x = self._after(layer, x, mixed)
        seen = target >= 0
        logits = self._logits(x[seen])
        return log_softmax(logits, -1).gather(1, target[seen][:, None])[:, 0]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, limit: int, generator: torch.Generator
    ) -> list[list[Completion]]:
        """`count` completions of each prompt at temperature 1, at most `limit` tokens each."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        starts = torch.tensor([longest - len(prompt) for prompt in prompts])
        layers = self.model.model.layers
        total = longest + limit
        place = torch.arange(total)
        # a row attends to its own tokens; padding attends to itself, as softmax needs one element
        visible = place[None, :longest] >= starts[:, None]
        causal = (place[:longest, None] >= place[None, :longest]) & visible[:, None, :]
        causal = causal | torch.eye(longest, dtype=torch.bool)
        position = (place[None, :longest] - starts[:, None]).clamp_min(0)
        x = embedding(ids, self.model.model.embed_tokens.weight)
        caches: list[tuple[Tensor, Tensor]] = []
        cosines, sines = self.cosines[position][:, None], self.sines[position][:, None]
        for layer in layers:
            q, k, v = self._heads_of(layer, x, cosines, sines)
            x = self._after(layer, x, scaled_dot_product_attention(q, k, v, attn_mask=causal[:, None]))
            caches.append((_room(k, count, total), _room(v, count, total)))
        logits = self._logits(x[:, -1]).repeat_interleave(count, 0)
        bias = torch.zeros(len(prompts), total).masked_fill_(place[None] < starts[:, None], float("-inf"))
        bias = bias.repeat_interleave(count, 0)[:, None, None, :]
        starts = starts.repeat_interleave(count)
        rows = torch.arange(len(starts))  # indices of the rows that are not finished
        tokens: list[list[int]] = [[] for _ in range(len(starts))]
        chances: list[list[float]] = [[] for _ in range(len(starts))]
        for step in range(limit):
            drawn, chance = _draw(logits, generator)
            for row, token, value in zip(rows.tolist(), drawn.tolist(), chance.tolist(), strict=True):
                tokens[row].append(token)
                chances[row].append(value)
            running = drawn != self.end
            left = int(running.sum())
            if not left or step == limit - 1:
                break
            if left < len(rows):
                rows, drawn, starts, bias = rows[running], drawn[running], starts[running], bias[running]
                remaining = running.nonzero()[:, 0]
                caches = [(k.index_select(0, remaining), v.index_select(0, remaining)) for k, v in caches]
            here = longest + step
            x = embedding(drawn, self.model.model.embed_tokens.weight)[:, None]
            cosines = self.cosines[here - starts][:, None, None]
            sines = self.sines[here - starts][:, None, None]
            for layer, (keys, values) in zip(layers, caches, strict=True):
                q, k, v = self._heads_of(layer, x, cosines, sines)
                keys[:, :, here], values[:, :, here] = k[:, :, 0], v[:, :, 0]
                mixed = scaled_dot_product_attention(
                    q, keys[:, :, : here + 1], values[:, :, : here + 1], attn_mask=bias[..., : here + 1]
                )
                x = self._after(layer, x, mixed)
            logits = self._logits(x[:, 0])
        flat = [Completion(tuple(t), tuple(c)) for t, c in zip(tokens, chances, strict=True)]
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _heads_of(self, layer: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, T, D / H), rotated by position."""
        attention = layer.self_attn
        normed = rms_norm(x, (self.width,), layer.input_layernorm.weight, self.eps)
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        parts = linear(normed, weight).view(*x.shape[:2], 3 * self.heads, -1).transpose(1, 2)
        both, v = parts[:, : 2 * self.heads], parts[:, 2 * self.heads :]
        first, second = both.chunk(2, -1)
        q, k = (both * cosines + torch.cat([-second, first], -1) * sines).chunk(2, 1)
        return q, k, v

    def _after(self, layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + linear(mixed.transpose(1, 2).flatten(2), layer.self_attn.o_proj.weight)
        normed = rms_norm(x, (self.width,), layer.post_attention_layernorm.weight, self.eps)
        gate, up = linear(normed, torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])).chunk(2, -1)
        return x + linear(silu(gate) * up, layer.mlp.down_proj.weight)

    def _logits(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, (self.width,), self.model.model.norm.weight, self.eps)
        return linear(normed, self.model.lm_head.weight)


def _room(part: Tensor, count: int, total: int) -> Tensor:
    """A cache for `count` rows of each prompt, (B * count, H, total, D / H), with the prompt's keys or values."""
    rows, heads, time, size = part.shape
    cache = torch.empty(rows * count, heads, total, size)
    cache[:, :, :time] = part.repeat_interleave(count, 0)
    return cache


def _draw(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens drawn at temperature 1 and their log-probabilities, (B,) each: the argmax of p / Exp(1) is a draw."""
    scores = log_softmax(logits, -1)
    noise = torch.empty_like(scores).exponential_(generator=generator)
    drawn = (scores - noise.log()).argmax(-1)
    return drawn, scores.gather(1, drawn[:, None])[:, 0]
