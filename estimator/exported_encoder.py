"""A checkpoint's model.onnx -> its BERT encoder in torch, with the numbers that are served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from transformers import BertConfig, BertModel

PARAMETER, MODULE = "model.encoder.", "/encoder/"  # how the exporter's names of tensors and of a module's outputs begin
INT8, SCALE, MATRIX = ".int8", ".scale", ".matrix"  # export.store_as_int8


def read_exported_encoder(serialized: bytes, heads: int) -> BertModel | None:
    """The encoder of an exported model; None if the file does not name every tensor of a BERT encoder.

    `heads`: of an attention layer, which no tensor's shape tells.
    """
    state = encoder_tensors(onnx.load_model_from_string(serialized))
    try:
        settings: dict[str, Any] = {**sizes_of(state), "num_attention_heads": heads, "attn_implementation": "eager"}
    except KeyError:
        return None
    with torch.random.fork_rng(devices=[]):  # a fit must not depend on where its encoder came from
        encoder = BertModel(BertConfig(**settings), add_pooling_layer=False)
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        return None
    encoder.load_state_dict(state)
    encoder.eval()
    return encoder


def encoder_tensors(exported: onnx.ModelProto) -> dict[str, Tensor]:
    """The encoder's tensors by their names in torch, expanded from int8.

    Embeddings, biases and norms keep their names in the file. A matrix is known by the module that multiplies by it.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    for node in exported.graph.node:
        if node.op_type == "Identity" and node.input[0] in stored:  # the exporter stores equal tensors once
            stored[node.output[0]] = stored[node.input[0]]
    tensors = {}
    for name in stored:
        plain = name.removesuffix(INT8)
        if plain.startswith(PARAMETER) and not plain.endswith(SCALE):
            tensors[plain.removeprefix(PARAMETER)] = torch.tensor(_expanded(stored, plain))
    for node in exported.graph.node:
        module = node.output[0].rpartition("/")[0]
        matrix = node.input[1].removesuffix(MATRIX) if node.op_type == "MatMul" else ""
        if module.startswith(MODULE) and (matrix in stored or matrix + INT8 in stored):
            name = module.removeprefix(MODULE).replace("/", ".")
            tensors[f"{name}.weight"] = torch.tensor(np.ascontiguousarray(_expanded(stored, matrix).T))
    return tensors


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """A BERT encoder's sizes, as BertConfig names them. Raises KeyError where a tensor that tells one is missing."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layer.")}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "intermediate_size": len(state["encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(state["embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(state["embeddings.token_type_embeddings.weight"]),
    }


def _expanded(stored: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """A tensor in fp32; stored as it is, or as int8 with scales."""
    if name in stored:
        return stored[name]
    expanded: NDArray[Any] = stored[name + INT8].astype(np.float32) * stored[name + SCALE]
    return expanded
