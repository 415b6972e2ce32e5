"""The estimator: a BERT-like encoder and a wide part, both feeding each pool's heads. Torch; runtime.py serves it.

The part on the encoder is linear, with the similarities to fitted prompts (similarity.py), or DEPO's trunk; the wide
part may be left out. The gateway's estimator is linear and wide, the paper's has the trunk and no wide part.

Shapes: B prompts, T tokens, D encoder width, E what is kept of a prompt's hidden states: their pooling, and with
centres their mean as well (D or 2D), S surface features, V token ids + hashed bigrams, K pools, O outputs: a logit for
every head (heads.py) of every pool, pool by pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.encoder import DEFAULT_ENCODER, encoder_of_checkpoint, load_encoder
from depo_gateway.estimator.heads import head_names, heads_named
from depo_gateway.estimator.similarity import MOST_WITH_TRAFFIC, Similarity
from depo_gateway.estimator.text import SURFACE, Prepared, TextConfig, load_tokenizer
from depo_gateway.estimator.vocabulary import narrow_embeddings
from depo_gateway.estimator.wide import BUCKETS

# The tensors whose columns are the O outputs -> which of their dimensions that is
OUTPUTS = {
    "wide_weight": 1, "surface_weight": 1, "bias": 0, "deep_weight": 1, "similarity.weight": 1,
    "group_weight": 1,
    "trunk.heads.weight": 0, "trunk.heads.bias": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    pools: tuple[str, ...]
    text: TextConfig
    encoder: str = DEFAULT_ENCODER  # a Hugging Face name, or a directory
    layers: int = 5  # the number of the encoder's first layers to keep; 0: all of them
    wide: bool = True  # without it there is no cheap stage
    trunk: bool = False  # False: linear heads
    heads: tuple[str, ...] = field(default_factory=head_names)
    groups: tuple[str, ...] = ()  # names of the tasks that have weights of their own
    centres: int = 0  # of fitted prompts; 0: no similarities and distances. Not with a trunk

    @property
    def shape(self) -> tuple[int, int]:
        """Pools and heads: a prompt's logits."""
        return len(self.pools), len(self.heads)


class Estimator(nn.Module):
    """logits = wide(n-grams, surface) + deep(encoder) + the group's, if it is known.

    All start at or near 0: an untrained model predicts 0.5.
    """

    idf: Tensor
    surface_mean: Tensor
    surface_scale: Tensor
    embedding_mean: Tensor
    embedding_scale: Tensor

    def __init__(
        self, config: ModelConfig, encoder: nn.Module, vocabulary: int, width: int, rounded: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.vocabulary, self.width = vocabulary, width
        self.rounded = rounded  # whether the encoder was rounded to int8 at creation
        self.trained: tuple[str, ...] = ()  # tensors of the encoder that a loaded checkpoint has trained
        self.loaded = False  # from a checkpoint: its heads are an average already
        outputs = len(config.pools) * len(config.heads)
        if config.wide:
            self.register_buffer("idf", torch.ones(vocabulary + BUCKETS))
            self.register_buffer("surface_mean", torch.zeros(len(SURFACE)))
            self.register_buffer("surface_scale", torch.zeros(len(SURFACE)))
            self.wide_weight = nn.Parameter(torch.zeros(vocabulary + BUCKETS, outputs))
            self.surface_weight = nn.Parameter(torch.zeros(len(SURFACE), outputs))
        if config.wide or not config.trunk:  # of the wide part, else of the linear heads
            self.bias = nn.Parameter(torch.zeros(outputs))
        if config.trunk:
            self.trunk = Trunk(width, outputs, seed)
        else:
            self.register_buffer("embedding_mean", torch.zeros(width))
            self.register_buffer("embedding_scale", torch.ones(width))
            self.deep_weight = nn.Parameter(torch.zeros(width, outputs))
        if config.groups:
            self.group_weight = nn.Parameter(torch.zeros(len(config.groups), outputs))
        if config.centres:
            self.similarity = Similarity(config.centres, width, outputs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """What the deep part reads of the encoder's hidden states (B, E)."""
        return self.pool(self.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, mask_BT)

    def pool(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states -> (B, E): by the manifest's pooling, and with centres their mean."""
        by_cls = self.config.text.pooling == "cls"
        if by_cls and not self.config.centres:
            return hidden_BTD[:, 0].clone()  # a view would keep all tokens in memory
        weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
        pooled_BD = hidden_BTD[:, 0] if by_cls else mean_BD
        return torch.cat([pooled_BD, mean_BD], 1) if self.config.centres else pooled_BD

    def standardised(self, embedding_BE: Tensor) -> Tensor:
        """The pooled part of it as linear heads read it (B, D)."""
        return (embedding_BE[:, : self.width] - self.embedding_mean) * self.embedding_scale

    def cosines(self, embedding_BE: Tensor) -> Tensor | None:
        """Similarity to each centre (B, C); None without centres."""
        return self.similarity.cosines(embedding_BE[:, self.width :]) if self.config.centres else None

    def deep(self, embedding_BE: Tensor) -> Tensor:
        """Deep logits (B, O)."""
        return self.deep_of(embedding_BE, self.cosines(embedding_BE))

    def deep_of(self, embedding_BE: Tensor, cosines_BC: Tensor | None) -> Tensor:
        """Deep logits (B, O), from `cosines` of the same."""
        if self.config.trunk:
            logits: Tensor = self.trunk(embedding_BE)
            return logits
        linear = self.standardised(embedding_BE) @ self.deep_weight
        if cosines_BC is not None:
            linear = linear + self.similarity(cosines_BC)
        return linear if self.config.wide else linear + self.bias

    def group(self, numbers_B: Tensor) -> Tensor:
        """Logits (B, O) of the prompts' groups by number; 0 for -1, an unknown one. Both stages add them."""
        known_B1 = (numbers_B >= 0)[:, None]
        return torch.where(known_B1, self.group_weight[numbers_B.clamp_min(0)], 0.0)

    def wide(self, indices: Tensor, offsets_B: Tensor, values: Tensor, surface_BS: Tensor) -> Tensor:
        """Wide logits (B, O) of the prompts' concatenated n-grams and standardised surface features."""
        bags = embedding_bag(indices, self.wide_weight, offsets_B, mode="sum", per_sample_weights=values)
        return bags + surface_BS @ self.surface_weight + self.bias


class DeepPart(nn.Module):
    """The part that is exported to ONNX: (ids, mask) -> deep logits and, with centres, the distances (B,)."""

    def __init__(self, model: Estimator) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        embedding_BE = self.model.embed(input_ids, attention_mask)
        cosines_BC = self.model.cosines(embedding_BE)
        logits_BO = self.model.deep_of(embedding_BE, cosines_BC)
        return logits_BO if cosines_BC is None else (logits_BO, self.model.similarity.distances(cosines_BC))


def create_model(
    config: ModelConfig, narrowed: Tokenizer | None = None, rounded: bool = True, seed: int = 0
) -> tuple[Estimator, Tokenizer]:
    """A new estimator on a pretrained encoder, and its tokenizer. Raises ValueError if there is no such encoder.

    `narrowed`: a smaller tokenizer (vocabulary.py) instead of the encoder's own. `rounded`: rounds what is stored as
    int8; not for an encoder that will be trained whole. `seed` determines a trunk's initial weights.
    """
    encoder, tokenizer = load_encoder(config.encoder, config.layers, rounded)
    if narrowed is not None and narrowed.get_vocab_size() < tokenizer.get_vocab_size():
        narrow_embeddings(encoder, tokenizer, narrowed)
        tokenizer = load_tokenizer(narrowed.to_str())
    return _untrained(config, encoder, tokenizer, rounded, seed), tokenizer


def _untrained(config: ModelConfig, encoder: Any, tokenizer: Tokenizer, rounded: bool, seed: int = 0) -> Estimator:
    """An estimator with new heads. Raises ValueError if the encoder can't read as many tokens as are asked for."""
    limit = int(getattr(encoder.config, "max_position_embeddings", 512))
    if config.text.max_tokens > limit:
        raise ValueError(f"max_tokens is {config.text.max_tokens}, but {config.encoder} reads at most {limit}")
    return Estimator(config, encoder, tokenizer.get_vocab_size(), int(encoder.config.hidden_size), rounded, seed)


def set_attention(model: Estimator, how: str) -> None:
    """Choose the encoder's attention implementation by its name in transformers: "eager", "sdpa"."""
    encoder: Any = model.encoder
    encoder.set_attn_implementation(how)


def collate(prepared: Sequence[Prepared], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Padded ids and mask, (B, T) each, on `device` (default: the CPU)."""
    length = max(len(p.ids) for p in prepared)
    ids_BT = torch.zeros(len(prepared), length, dtype=torch.long)
    mask_BT = torch.zeros(len(prepared), length, dtype=torch.long)
    for row, p in enumerate(prepared):
        ids_BT[row, : len(p.ids)] = torch.tensor(p.ids)
        mask_BT[row, : len(p.ids)] = 1
    return ids_BT.to(device), mask_BT.to(device)


def select_pools(model: Estimator, pools: Sequence[str]) -> Estimator:
    """A copy that predicts only these pools, in this order; it shares the encoder. For export, not for training.

    Raises ValueError for a pool that the model does not have.
    """
    if unknown := [pool for pool in pools if pool not in model.config.pools]:
        raise ValueError(f"the model has no pool {unknown[0]!r}; it has {', '.join(model.config.pools)}")
    config = replace(model.config, pools=tuple(pools))
    part = Estimator(config, model.encoder, model.vocabulary, model.width, model.rounded).to(model.device)
    heads = len(config.heads)
    numbers = [heads * model.config.pools.index(pool) + head for pool in pools for head in range(heads)]
    columns = torch.tensor(numbers, device=model.device)
    state = {
        name: tensor.index_select(OUTPUTS[name], columns) if name in OUTPUTS else tensor
        for name, tensor in model.state_dict().items()
    }
    part.load_state_dict(state)
    part.trained, part.loaded = model.trained, model.loaded
    return part.train(model.training)


def expanded(model: Estimator, groups: Sequence[str], centres: int) -> Estimator:
    """A copy with room for more groups and for so many new centres; it shares the encoder, and predicts the same.

    The new centres are the last, and empty. There are MOST_WITH_TRAFFIC at most: then they take the newest ones' place.
    """
    before = model.config
    kept = min(before.centres, MOST_WITH_TRAFFIC - centres)
    every = tuple(dict.fromkeys((*before.groups, *groups)))
    config = replace(before, groups=every, centres=kept + centres if before.centres else 0)
    grown = Estimator(config, model.encoder, model.vocabulary, model.width, model.rounded).to(model.device)
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        rows = min(len(tensor), len(state[name])) if tensor.dim() else 0
        if tensor.shape == state[name].shape:
            state[name] = tensor
        else:
            state[name][:rows] = tensor[:rows]
    grown.load_state_dict(state)
    if grown.config.centres and centres:
        grown.similarity.empty(centres)
    grown.trained, grown.loaded = model.trained, model.loaded
    return grown.train(model.training)


def weights_of(model: Estimator, trained: Sequence[str]) -> bytes:
    """model.safetensors: everything but the encoder, and of the encoder the tensors named in `trained`."""
    state = model.state_dict()
    stored = {n: t.cpu().contiguous() for n, t in state.items() if not n.startswith("encoder.") or n in set(trained)}
    return safetensors.torch.save(stored)


def load_model(path: Path) -> tuple[Estimator, Tokenizer, checkpoint.Manifest]:
    """A checkpoint to train further: its encoder, with the checkpoint's own tensors.

    An encoder of the default's kind is read from the checkpoint itself, any other is loaded by its name.
    """
    manifest, files = checkpoint.load_checkpoint(path)
    base = manifest.base
    try:
        heads_named(manifest.heads)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} can't be trained further: {error}") from None
    config = ModelConfig(
        manifest.pools,
        manifest.text,
        base.encoder,
        base.layers,
        base.wide,
        base.trunk,
        manifest.heads,
        base.groups,
        base.centres,
    )
    tokenizer = load_tokenizer(files[checkpoint.TOKENIZER].decode())
    encoder = encoder_of_checkpoint(base, files)
    if encoder is None:
        model, tokenizer = create_model(config, tokenizer, base.rounded)
    else:
        model = _untrained(config, encoder, tokenizer, base.rounded)
    state = safetensors.torch.load(files[checkpoint.WEIGHTS])
    expected = {n for n in model.state_dict() if not n.startswith("encoder.")} | set(base.trained)
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)
        raise ValueError(f"checkpoint {path}: {checkpoint.WEIGHTS} does not fit its manifest, see {odd[0]}")
    model.load_state_dict(state, strict=False)
    model.trained, model.loaded = base.trained, True
    return model, tokenizer, manifest


HIDDEN, OUT, BLOCKS, DROPOUT = 1024, 512, 2, 0.1


TRUNK_DEVIATION, HEAD_DEVIATION = (
    0.02,
    0.001,
)  # of the initial weights; the heads' are so small that the first output is about 0.5


class Trunk(nn.Module):
    """Linear-LayerNorm-GELU to 1024, two residual blocks, Linear-LayerNorm-GELU-Dropout to 512, linear heads."""

    def __init__(self, width: int, outputs: int, seed: int = 0) -> None:
        """The initial weights depend on `seed` only, so all processes of a run begin with the same."""
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
                    nn.init.zeros_(module.bias)  # LayerNorms are 1 and 0 by default

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Pooled hidden states (B, D) -> logits (B, O)."""
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
