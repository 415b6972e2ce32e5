"""The optimizer around an estimator: step() is one online update, over a table or over traffic.

Wide part and heads learn by SGD with momentum: their features have unit length, so early-stopped SGD from zero shrinks
like ridge regression, where Adam would blow up each rare token's weight. The encoder's layers, if trained, learn by
AdamW.
Everything is fp32: in bf16 most of an encoder's weights never move at these learning rates.

Shapes: B prompts of a batch, K pools, H = 2K outputs, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from estimator import losses, wide
from estimator.model import Estimator, collate
from estimator.records import Example
from estimator.text import Prepared, prepare

AVERAGE = 0.99  # decay of the running average of the heads, a step


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    learning_rate: float = 0.15  # of the deep heads
    wide_learning_rate: float = 0.4
    encoder_learning_rate: float = 3e-5
    train_layers: int = 0  # of the encoder's layers kept, the last so many are trained; 0: frozen
    # Both off (1.0 is the paper's weight for ranking): at these learning rates neither routed better; see "The terms of
    # the loss" in benchmarks/results/routing.md
    ranking_weight: float = 0.0
    gain_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("train_layers", "ranking_weight", "gain_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class Item:
    """An example made ready for many steps."""

    prepared: Prepared
    indices: NDArray[np.int64]
    counts: NDArray[np.float32]
    embedding: Tensor | None  # (D,), while the encoder is frozen
    quality: tuple[float, ...]  # NaN: no label
    token_confidence: tuple[float, ...]
    weight: float


class Learner:
    """Holds a model and its optimizers."""

    def __init__(self, model: Estimator, tokenizer: Tokenizer, config: LearnerConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.trained = trained_names(model, config.train_layers)
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(f"encoder.{name}" in self.trained)
        heads = [model.wide_weight, model.surface_weight, model.bias, model.deep_weight]
        rates: list[dict[str, Any]] = [
            {"params": heads[:3], "lr": config.wide_learning_rate},
            {"params": heads[3:], "lr": config.learning_rate},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(rates, momentum=0.9, nesterov=True)]
        if self.trained:
            encoder = [p for p in model.encoder.parameters() if p.requires_grad]
            self.optimizers.append(torch.optim.AdamW(encoder, lr=config.encoder_learning_rate, weight_decay=0.01))
        self.heads = heads
        self.average = [parameter.detach().clone() for parameter in heads]
        self.steps = 0
        model.eval()  # no dropout: a handful of epochs on a pretrained encoder, and cached embeddings must stay true

    def items(
        self, examples: Sequence[Example], batch_size: int = 64, embeddings: Sequence[Tensor] | None = None
    ) -> list[Item]:
        """Tokenise, and embed if the encoder is frozen, unless the embeddings are known already."""
        prepared = [prepare(self.tokenizer, self.model.config.text, e.prompt, e.context) for e in examples]
        embedded: Sequence[Tensor | None] = [None] * len(prepared)
        if not self.trained:
            embedded = self._embed_all(prepared, batch_size) if embeddings is None else embeddings
        pools, vocabulary = self.model.config.pools, len(self.model.idf) - wide.BUCKETS
        return [
            Item(
                ready,
                *wide.ngrams(ready.ids, vocabulary),
                embedding,
                tuple(_label(example.quality.get(pool)) for pool in pools),
                tuple(_label(example.token_confidence.get(pool)) for pool in pools),
                example.weight,
            )
            for example, ready, embedding in zip(examples, prepared, embedded, strict=True)
        ]

    def fit_statistics(self, items: Sequence[Item]) -> None:
        """Set rarity weights, scales and biases from a first set of items. Not for later steps."""
        model = self.model
        vocabulary = len(model.idf) - wide.BUCKETS
        model.idf.copy_(torch.from_numpy(wide.fit_idf([item.prepared.ids for item in items], vocabulary)))
        surface = torch.tensor([item.prepared.surface for item in items])
        model.surface_mean.copy_(surface.mean(0))
        model.surface_scale.copy_(_inverse(surface.std(0, correction=0), 1e-4))
        with torch.no_grad():
            embedding = torch.cat([self._embed(items[i : i + 64]) for i in range(0, len(items), 64)])
        model.embedding_mean.copy_(embedding.mean(0))
        model.embedding_scale.copy_(_inverse(embedding.std(0, correction=0), 1e-3) / embedding.shape[1] ** 0.5)
        targets = torch.tensor([item.quality + item.token_confidence for item in items])
        means = targets.nanmean(0).nan_to_num(0.5).clamp(0.02, 0.98)
        with torch.no_grad():
            model.bias.copy_(torch.logit(means).reshape(2, -1).T.reshape(-1))
        self.average[2].copy_(model.bias.detach())

    def step(self, batch: Sequence[Example]) -> dict[str, float]:
        """One online update on a batch of examples; the loss terms of the full stage, before the update."""
        return self.step_items(self.items(batch))

    def step_items(self, items: Sequence[Item]) -> dict[str, float]:
        """One update on items made by items()."""
        full, cheap = self._logits(items)
        pools = len(self.model.config.pools)
        t_BK = torch.tensor([item.quality for item in items])
        d_BK = torch.tensor([item.token_confidence for item in items])
        w_B = torch.tensor([item.weight for item in items])
        terms = self._terms(full.reshape(-1, pools, 2), t_BK, d_BK, w_B)
        # the wide part must stand alone as the cheap stage, so it answers for itself as well
        alone = self._terms(cheap.reshape(-1, pools, 2), t_BK, d_BK, w_B)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (sum(terms.values()) + sum(alone.values())).backward()  # type: ignore[union-attr]
        if self.trained:
            torch.nn.utils.clip_grad_norm_([p for p in self.model.encoder.parameters() if p.requires_grad], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        # the usual warm-up of a running average: the first steps from zero are soon forgotten, a checkpoint is not
        decay = AVERAGE if self.model.loaded else min(AVERAGE, (1 + self.steps) / (10 + self.steps))
        for averaged, parameter in zip(self.average, self.heads, strict=True):
            averaged.lerp_(parameter.detach(), 1 - decay)
        return {name: float(term.detach()) for name, term in terms.items()}

    def predict(self, items: Sequence[Item]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits of the full and of the cheap stage, (N, K, 2) each."""
        shape = (-1, len(self.model.config.pools), 2)
        with self.averaged(), torch.no_grad():
            parts = [self._logits(items[start : start + 256]) for start in range(0, len(items), 256)]
        full, cheap = (torch.cat(stage).reshape(shape).double().numpy() for stage in zip(*parts, strict=True))
        return full, cheap

    @contextmanager
    def averaged(self) -> Iterator[Estimator]:
        """The model with its heads' running average, which is what predicts and is saved: one step's noise is not."""
        live = [parameter.detach().clone() for parameter in self.heads]
        _assign(self.heads, self.average)
        try:
            yield self.model
        finally:
            _assign(self.heads, live)

    def _terms(self, logits_BKH: Tensor, t_BK: Tensor, d_BK: Tensor, w_B: Tensor) -> dict[str, Tensor]:
        z_BK, u_BK = logits_BKH.unbind(2)
        terms = {
            "advantage": losses.advantage(z_BK, t_BK, w_B),
            "distillation": losses.distillation(u_BK, d_BK, w_B),
        }
        if weight := self.config.ranking_weight:
            terms["ranking"] = weight * losses.ranking(z_BK, t_BK, w_B)  # (B, B, K) numbers: dear, so not for nothing
        if weight := self.config.gain_weight:
            terms["gain"] = weight * losses.gain(z_BK, t_BK, w_B)
        return terms

    def _logits(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """(full, cheap) logits, (B, H) each."""
        model = self.model
        lengths = [len(item.indices) for item in items]
        indices = torch.from_numpy(np.concatenate([item.indices for item in items]))
        values = torch.from_numpy(np.concatenate([item.counts for item in items])) * model.idf[indices]
        rows = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(lengths))
        norms = torch.zeros(len(items)).index_add(0, rows, values * values).sqrt().clamp_min(1e-9)
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        surface = torch.tensor([item.prepared.surface for item in items])
        surface = wide.SURFACE_SCALE * ((surface - model.surface_mean) * model.surface_scale).clamp(
            -wide.CLIP, wide.CLIP
        )
        cheap = model.wide(indices, offsets, values / norms[rows], surface)
        return cheap + model.deep(self._embed(items)), cheap

    def _embed_all(self, prepared: Sequence[Prepared], batch_size: int) -> list[Tensor]:
        """An embedding each. Like lengths go together, which saves padding; the order is kept."""
        order = sorted(range(len(prepared)), key=lambda i: len(prepared[i].ids))
        embedded: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with torch.no_grad():  # not inference_mode: what it makes can't be used in a step later
                batch = self.model.embed(*collate([prepared[i] for i in rows]))
            embedded |= zip(rows, (row.clone() for row in batch), strict=True)  # a view would keep the whole batch
        return [embedded[row] for row in range(len(prepared))]

    def _embed(self, items: Sequence[Item]) -> Tensor:
        cached = [item.embedding for item in items if item.embedding is not None]
        if len(cached) == len(items):
            return torch.stack(cached)
        return self.model.embed(*collate([item.prepared for item in items]))


def trained_names(model: Estimator, train_layers: int) -> tuple[str, ...]:
    """Names of the encoder's tensors in its last `train_layers` layers."""
    names = [name for name, _ in model.encoder.named_parameters()]
    numbers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if train_layers > len(numbers):
        raise ValueError(f"train_layers is {train_layers}, but {len(numbers)} layers of the encoder are kept")
    chosen = {str(number) for number in numbers[len(numbers) - train_layers :]}
    return tuple(f"encoder.{name}" for name in names if chosen & set(name.split(".")))


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _label(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _inverse(deviation: Tensor, floor: float) -> Tensor:
    return torch.where(deviation > floor, 1.0 / deviation.clamp_min(floor), 0.0)
