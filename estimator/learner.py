"""The optimizer of an estimator: step() is one online update, on a table or on traffic.

Wide part and linear heads learn by SGD with momentum: their features have unit length, so early-stopped SGD from zero
shrinks like ridge regression, whereas Adam would inflate the weights of rare tokens. The trunk and the trained part of
the encoder learn by AdamW, clipped together.
Everything is fp32, also under a caller's autocast: in bf16 most of an encoder's weights never change at these learning
rates.

Shapes: B prompts of a batch, K pools, H heads, O = K * H outputs, D encoder width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from depo_gateway.estimator import losses, wide
from depo_gateway.estimator.forward_context import fp32, recompute_activations, seeded_dropout
from depo_gateway.estimator.heads import QUALITY, heads_named, pool_labels, split_heads
from depo_gateway.estimator.model import Estimator, collate, set_attention
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import Prepared, prepare

WHOLE = -1  # train_layers: the whole encoder, embeddings included


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    learning_rate: float = 0.15  # of linear deep heads
    wide_learning_rate: float = 0.4
    weight_decay: float = 0.0  # of wide part and linear heads; long training needs some
    trunk_learning_rate: float = 2e-4
    encoder_learning_rate: float = 3e-5
    train_layers: int = 0  # the number of the encoder's last layers to train; 0: frozen; -1: WHOLE
    average: float = 0.99  # decay per step of the running average of all weights but the encoder's; 0: no average
    dropout: bool = False  # in training steps
    distillation_weight: float = 1.0  # the paper's, as 1.0 is for ranking
    # Both off: at these learning rates neither improved routing; see "The terms of the loss" in
    # benchmarks/results/routing.md
    ranking_weight: float = 0.0
    gain_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ranking_weight", "gain_weight", "distillation_weight", "trunk_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not WHOLE <= self.train_layers < float("inf"):
            raise ValueError(f"train_layers is {self.train_layers}; it must be 0 or more, or -1 for the whole encoder")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; it must be at least 0 and less than 1")


# The paper's (arXiv 2602.06375), for a model with the trunk, without the wide part, on an unrounded encoder
FAITHFUL = LearnerConfig(
    trunk_learning_rate=2e-4,
    encoder_learning_rate=0.2 * 2e-4,
    train_layers=WHOLE,
    average=0.0,
    dropout=True,
    distillation_weight=1.0,
    ranking_weight=1.0,
)


NO_NGRAMS = (np.zeros(0, np.int64), np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True)
class Item:
    """An example prepared for many steps."""

    prepared: Prepared
    indices: NDArray[np.int64]
    counts: NDArray[np.float32]
    embedding: Tensor | None  # (E,), as in model.py; None: the encoder is trained
    labels: tuple[tuple[float, ...], ...]  # by head and pool; NaN: no label
    weight: float
    group: int = -1  # its number among the model's; -1: none of them

    @property
    def quality(self) -> tuple[float, ...]:
        return self.labels[QUALITY]


class Learner:
    """A model and its optimizers."""

    def __init__(self, model: Estimator, tokenizer: Tokenizer, config: LearnerConfig, seed: int = 0) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed  # of dropout
        self.trained = trained_names(model, config.train_layers)
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(f"encoder.{name}" in self.trained)
        self.heads = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
        if (
            self.trained
        ):  # eager attention, which is exported, would store each layer's (B, heads, T, T) for the backward pass
            set_attention(model, "sdpa")
        self.optimizers = optimizers_of(model, config)
        self.average = [parameter.detach().clone() for parameter in self.heads] if config.average else []
        self.settled = model.loaded  # whether the average is over many steps already
        self.steps = 0
        model.eval()  # cached embeddings must stay valid; dropout is on within a step only

    def items(
        self, examples: Sequence[Example], batch_size: int = 64, embeddings: Sequence[Tensor] | None = None
    ) -> list[Item]:
        """Tokenise and, if the encoder is frozen, embed, unless the embeddings are given."""
        prepared = [prepare(self.tokenizer, self.model.config.text, e.prompt, e.context) for e in examples]
        embedded: Sequence[Tensor | None] = [None] * len(prepared)
        if not self.trained:
            embedded = self._embed_all(prepared, batch_size) if embeddings is None else embeddings
        pools, heads = self.model.config.pools, self.model.config.heads
        groups = {name: number for number, name in enumerate(self.model.config.groups)}
        return [
            Item(
                ready,
                *(wide.ngrams(ready.ids, self.model.vocabulary) if self.model.config.wide else NO_NGRAMS),
                embedding,
                tuple(pool_labels(example, head, pools) for head in heads),
                example.weight,
                groups.get(example.task, -1),
            )
            for example, ready, embedding in zip(examples, prepared, embedded, strict=True)
        ]

    def fit_statistics(self, items: Sequence[Item]) -> None:
        """Set rarity weights, scales and biases from a first set of items, before any step.

        A model with a trunk and without the wide part has none of these.
        """
        model = self.model
        if model.config.wide:
            model.idf.copy_(torch.from_numpy(wide.fit_idf([item.prepared.ids for item in items], model.vocabulary)))
            surface = torch.tensor([item.prepared.surface for item in items])
            model.surface_mean.copy_(surface.mean(0))
            model.surface_scale.copy_(_inverse(surface.std(0, correction=0), 1e-4))
        if not model.config.trunk:
            with fp32(model.device):
                embedding = torch.cat([self._embed(items[i : i + 64]) for i in range(0, len(items), 64)])
            pooled = embedding[:, : model.width]
            model.embedding_mean.copy_(pooled.mean(0))
            model.embedding_scale.copy_(_inverse(pooled.std(0, correction=0), 1e-3) / model.width**0.5)
            if model.config.centres:
                model.similarity.place(embedding[:, model.width :])
        if model.config.wide or not model.config.trunk:
            targets_NHK = torch.tensor([item.labels for item in items])
            means_HK = targets_NHK.nanmean(0).nan_to_num(0.5).clamp(0.02, 0.98)
            with torch.no_grad():
                model.bias.copy_(torch.logit(means_HK).T.reshape(-1))
            for averaged, parameter in zip(self.average, self.heads, strict=False):
                if parameter is model.bias:
                    averaged.copy_(parameter.detach())

    def step(self, batch: Sequence[Example]) -> dict[str, float]:
        """One online update on a batch of examples. Returns the loss terms of the full stage before the update."""
        return self.step_items(self.items(batch))

    def step_items(self, items: Sequence[Item]) -> dict[str, float]:
        """One update on items made by items()."""
        device = self.model.device
        targets_BHK = torch.tensor([item.labels for item in items], device=device)
        w_B = torch.tensor([item.weight for item in items], device=device)
        # the same masks in every process and after a resume
        drawn = int(np.random.SeedSequence([self.seed, self.steps]).generate_state(1, np.uint64)[0])
        masks = seeded_dropout(self.model, device, drawn) if self.config.dropout else nullcontext()
        padded = len(items) * max(len(item.prepared.ids) for item in items)
        with fp32(device, gradients=True), masks, recompute_activations(self.model.encoder, padded):
            full, cheap = self._logits(items)  # one graph for all terms, and so one dropout mask
            group = self._group_logits(items)
            terms = self._terms(full, targets_BHK, w_B)
            loss: Any = sum(terms.values())
            if cheap is not None:  # the wide part alone is the cheap stage, so it has its own loss as well
                loss = loss + sum(self._terms(cheap, targets_BHK, w_B).values())
            if group is not None:  # half with the groups and half without, so that both ways of serving are fitted
                told = [stage + group for stage in (full, cheap) if stage is not None]
                loss = (loss + sum(term for one in told for term in self._terms(one, targets_BHK, w_B).values())) / 2
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                clipped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                torch.nn.utils.clip_grad_norm_(clipped, 1.0)
            optimizer.step()
        self.steps += 1
        # the usual warm-up of a running average, which soon forgets the first steps from zero; not for a checkpoint
        decay = self.config.average if self.settled else min(self.config.average, (1 + self.steps) / (10 + self.steps))
        if self.average:
            for averaged, parameter in zip(self.average, self.heads, strict=True):
                averaged.lerp_(parameter.detach(), 1 - decay)
        return {name: float(term.detach()) for name, term in terms.items()}

    def score(self, prompts: Sequence[str], batch_size: int = 64) -> NDArray[np.float64]:
        """Logits of the full stage (N, K, H) by the averaged weights, batched by length."""
        items = self.items([Example(prompt, {}) for prompt in prompts], batch_size)
        order = sorted(range(len(items)), key=lambda i: len(items[i].prepared.ids))
        logits = np.zeros((len(items), *self.model.config.shape))
        with self.averaged(), fp32(self.model.device):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                full, _ = self._logits([items[i] for i in rows])
                logits[rows] = split_heads(full.double().cpu().numpy(), len(self.model.config.heads))
        return logits

    def predict(self, items: Sequence[Item]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits of the full and the cheap stage, (N, K, H) each; without a wide part the full stage's twice.

        Each item's group counts, if the model knows it.
        """
        full: list[Tensor] = []
        cheap: list[Tensor] = []
        with self.averaged(), fp32(self.model.device):
            for start in range(0, len(items), 256):
                batch = items[start : start + 256]
                both, alone = self._logits(batch)
                group = self._group_logits(batch)
                stages_BO = (both, both if alone is None else alone)
                for into, stage in zip((full, cheap), stages_BO, strict=True):
                    into.append(stage if group is None else stage + group)
        heads = len(self.model.config.heads)
        stages = [split_heads(torch.cat(stage).double().cpu().numpy(), heads) for stage in (full, cheap)]
        return stages[0], stages[1]

    def distances(self, items: Sequence[Item]) -> NDArray[np.float64] | None:
        """Distances (N,) from the fitted prompts; None for a model without centres."""
        found = []
        with fp32(self.model.device):
            for start in range(0, len(items), 256):
                cosines = self.model.cosines(self._embed(items[start : start + 256]))
                if cosines is None:
                    return None
                found.append(self.model.similarity.distances(cosines))
        return torch.cat(found).double().cpu().numpy() if found else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, as tensors and plain values; a copy, which they don't change."""
        return copy.deepcopy(
            {
                "weights": self._weights(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "average": self.average,
                "settled": self.settled,
                "steps": self.steps,
                "seed": self.seed,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue bit by bit where state_dict() was taken. Raises ValueError for the state of other settings."""
        own, saved = ({name: tensor.shape for name, tensor in w.items()} for w in (self._weights(), state["weights"]))
        if own != saved or len(self.average) != len(state["average"]):
            odd = sorted(name for name in {*own, *saved} if own.get(name) != saved.get(name)) or ["the average"]
            raise ValueError(f"the estimator's saved state is of other settings: it differs in {odd[0]}")
        self.model.load_state_dict(state["weights"], strict=False)
        for optimizer, of in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of)
        _assign(self.average, state["average"])
        self.settled, self.steps, self.seed = state["settled"], state["steps"], state["seed"]

    def _weights(self) -> dict[str, Tensor]:
        """The weights that steps change or a loaded checkpoint has trained: all but the frozen part of the encoder."""
        changed = {*self.trained, *self.model.trained}
        state = self.model.state_dict()
        return {name: t for name, t in state.items() if not name.startswith("encoder.") or name in changed}

    @contextmanager
    def averaged(self) -> Iterator[Estimator]:
        """The model with the running average of its heads, which predicts and is saved, free of one step's noise."""
        if not self.average:
            yield self.model
            return
        live = [parameter.detach().clone() for parameter in self.heads]
        _assign(self.heads, self.average)
        try:
            yield self.model
        finally:
            _assign(self.heads, live)

    def settle(self) -> None:
        """Make the running average the model's own weights, after the last step."""
        if self.average:
            _assign(self.heads, self.average)
            self.average = []

    def _terms(self, outputs_BO: Tensor, targets_BHK: Tensor, w_B: Tensor) -> dict[str, Tensor]:
        """The loss terms of one stage: each head's own, unless its weight is 0, then the quality head's others."""
        heads = heads_named(self.model.config.heads)
        logits, targets = split_heads(outputs_BO, len(heads)).unbind(2), targets_BHK.unbind(1)
        terms = {}
        for head, logits_BK, targets_BK in zip(heads, logits, targets, strict=True):
            weight = 1.0 if head.weight is None else getattr(self.config, head.weight)
            if weight:
                terms[head.term] = weight * (head.scale * losses.cross_entropy(logits_BK, targets_BK, w_B))
        z_BK, t_BK = logits[QUALITY], targets[QUALITY]
        if weight := self.config.ranking_weight:
            terms["ranking"] = weight * losses.ranking(z_BK, t_BK, w_B)  # (B, B, K) numbers, so not if its weight is 0
        if weight := self.config.gain_weight:
            terms["gain"] = weight * losses.gain(z_BK, t_BK, w_B)
        return terms

    def _logits(self, items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """(full, cheap) logits, (B, O) each; no cheap ones without a wide part."""
        model, device = self.model, self.model.device
        if not model.config.wide:
            return model.deep(self._embed(items)), None
        lengths = [len(item.indices) for item in items]
        indices = torch.from_numpy(np.concatenate([item.indices for item in items])).to(device)
        counts = torch.from_numpy(np.concatenate([item.counts for item in items])).to(device)
        values = counts * model.idf[indices]
        rows = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(lengths)).to(device)
        squares = torch.zeros(len(items), device=device).index_add(0, rows, values * values)
        norms = squares.sqrt().clamp_min(1e-9)
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(device)
        surface = torch.tensor([item.prepared.surface for item in items], device=device)
        surface = wide.SURFACE_SCALE * ((surface - model.surface_mean) * model.surface_scale).clamp(
            -wide.CLIP, wide.CLIP
        )
        cheap = model.wide(indices, offsets, values / norms[rows], surface)
        return cheap + model.deep(self._embed(items)), cheap

    def _group_logits(self, items: Sequence[Item]) -> Tensor | None:
        """What the items' groups add to both stages (B, O); None if none is known."""
        if not self.model.config.groups or all(item.group < 0 for item in items):
            return None
        return self.model.group(torch.tensor([item.group for item in items], device=self.model.device))

    def _embed_all(self, prepared: Sequence[Prepared], batch_size: int) -> list[Tensor]:
        """The embedding of each, in order. Batched by length, which saves padding."""
        order = sorted(range(len(prepared)), key=lambda i: len(prepared[i].ids))
        embedded: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with fp32(self.model.device):
                batch = self.model.embed(*collate([prepared[i] for i in rows], self.model.device))
            embedded |= zip(rows, (row.clone() for row in batch), strict=True)  # a view would keep the whole batch
        return [embedded[row] for row in range(len(prepared))]

    def _embed(self, items: Sequence[Item]) -> Tensor:
        cached = [item.embedding for item in items if item.embedding is not None]
        if len(cached) == len(items):
            return torch.stack(cached)
        return self.model.embed(*collate([item.prepared for item in items], self.model.device))


def optimizers_of(model: Estimator, config: LearnerConfig) -> list[torch.optim.Optimizer]:
    """SGD for wide part and linear heads, AdamW for the encoder's trained tensors and the trunk, if it has them."""
    sgd: list[dict[str, Any]] = []
    if model.config.wide:
        sgd.append({"params": [model.wide_weight, model.surface_weight, model.bias], "lr": config.wide_learning_rate})
    if not model.config.trunk:
        linear = [model.deep_weight] if model.config.wide else [model.deep_weight, model.bias]
        linear += [model.similarity.weight] if model.config.centres else []
        linear += [model.group_weight] if model.config.groups else []
        sgd.append({"params": linear, "lr": config.learning_rate})
    adam: list[dict[str, Any]] = []
    if encoder := [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]:
        adam.append({"params": encoder, "lr": config.encoder_learning_rate})
    if model.config.trunk:
        adam.append({"params": list(model.trunk.parameters()), "lr": config.trunk_learning_rate})
    optimizers: list[torch.optim.Optimizer] = []
    if sgd:
        optimizers.append(torch.optim.SGD(sgd, momentum=0.9, nesterov=True, weight_decay=config.weight_decay))
    if adam:
        optimizers.append(torch.optim.AdamW(adam, weight_decay=0.01))
    return optimizers


def trained_names(model: Estimator, train_layers: int) -> tuple[str, ...]:
    """Names of the encoder's tensors in its last `train_layers` layers, or of all its tensors if that is WHOLE."""
    names = [name for name, _ in model.encoder.named_parameters()]
    if train_layers == WHOLE:
        return tuple(f"encoder.{name}" for name in names)
    numbers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if train_layers > len(numbers):
        raise ValueError(f"train_layers is {train_layers}, but the model has {len(numbers)} layers of the encoder")
    chosen = {str(number) for number in numbers[len(numbers) - train_layers :]}
    return tuple(f"encoder.{name}" for name in names if chosen & set(name.split(".")))


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _inverse(deviation: Tensor, floor: float) -> Tensor:
    return torch.where(deviation > floor, 1.0 / deviation.clamp_min(floor), 0.0)
