"""Estimator -> the files of a checkpoint: ONNX of the deep part with int8 weights, the rest's weights, the tokenizer.

Weights are stored as int8 with a scale per row if that is lossless; arithmetic is fp32. ONNX Runtime expands the
matrices once, when it loads, and of the embedding table only the rows looked up. So the file is a quarter of the size,
and the scores equal torch's. Trained layers are stored in fp32: fine-tuning steps are smaller than int8 steps.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.checkpoint import Base, Manifest
from depo_gateway.estimator.encoder import int8_of
from depo_gateway.estimator.model import DeepPart, Estimator, set_attention, weights_of

SMALL = 4096  # fewer numbers than this stay fp32
EXACT = 1e-4  # of an int8 step; a matrix rounded before is off by 2e-5, because of fp32 arithmetic


def onnx_bytes(model: Estimator) -> bytes:
    """The deep part as ONNX, for any batch size and length. The model is not changed."""
    part = DeepPart(copy.deepcopy(model)).cpu().eval()
    set_attention(part.model, "eager")  # a learner may have set another, which ONNX can't hold
    ids, mask = torch.randint(0, min(100, model.vocabulary), (2, 8)), torch.ones(2, 8, dtype=torch.long)
    axes = {0: "prompts", 1: "tokens"}
    outputs = ["logits", "distances"] if model.config.centres else ["logits"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but as exact as the new one and faster: 1 s instead of 12.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="Exporting aten::index operator")
        plain = Path(folder) / "plain.onnx"
        torch.onnx.export(
            part,
            (ids, mask),
            str(plain),
            input_names=["input_ids", "attention_mask"],
            output_names=outputs,
            dynamic_axes={"input_ids": axes, "attention_mask": axes} | {name: {0: "prompts"} for name in outputs},
            opset_version=17,
            dynamo=False,
        )
        exported = onnx.load(plain)
    store_as_int8(exported)
    onnx.checker.check_model(exported)
    serialized: bytes = exported.SerializeToString()
    return serialized


def store_as_int8(exported: onnx.ModelProto) -> None:
    """Replace the large matrices of MatMul and Gather nodes by int8 ones, in place, if that is lossless.

    It is lossless for an untrained encoder, rounded before (encoder.round_to_int8), not for trained layers and heads.
    Scales are per row of the torch weight, which is a column of a MatMul's matrix.
    """
    graph = exported.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        matrix = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        name = "" if matrix is None else node.input[matrix]
        if name not in tensors or len(tensors[name].dims) != 2 or np.prod(tensors[name].dims) < SMALL:
            nodes.append(node)
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())
        lookup = node.op_type == "Gather"
        values = values if lookup else values.T
        rows, scale = int8_of(values)
        if ((rows * scale - values).abs() > EXACT * scale).any():
            nodes.append(node)
            continue
        stored = (rows if lookup else rows.T).to(torch.int8).contiguous().numpy()
        graph.initializer.append(numpy_helper.from_array(stored, f"{name}.int8"))
        scales = (scale if lookup else scale.T).contiguous().numpy()
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
        if lookup:
            ids, out = node.input[1], node.output[0]
            nodes += [
                helper.make_node("Gather", [f"{name}.int8", ids], [f"{out}.rows"]),
                helper.make_node("Gather", [f"{name}.scale", ids], [f"{out}.scales"]),
                helper.make_node("Cast", [f"{out}.rows"], [f"{out}.floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{out}.floats", f"{out}.scales"], [out]),
            ]
        else:
            nodes += [
                helper.make_node("Cast", [f"{name}.int8"], [f"{name}.floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{name}.floats", f"{name}.scale"], [f"{name}.matrix"]),
            ]
            node.input[1] = f"{name}.matrix"
            nodes.append(node)
        graph.initializer.remove(tensors.pop(name))
    del graph.node[:]
    graph.node.extend(nodes)


def export_checkpoint(
    directory: Path,
    model: Estimator,
    tokenizer: Tokenizer,
    calibrated: Calibration,
    metrics: Mapping[str, Any],
    trained: Sequence[str] = (),
    parent: str | None = None,
) -> Manifest:
    """Export a model and write it as a checkpoint.

    `trained` names the encoder's tensors that were trained since the model was loaded or created.
    """
    changed = tuple(sorted({*model.trained, *trained}))
    files = {
        checkpoint.WEIGHTS: weights_of(model, changed),
        checkpoint.TOKENIZER: tokenizer.to_str().encode(),
        checkpoint.ENCODER: onnx_bytes(model),
        checkpoint.CALIBRATION: calibration.dumps(calibrated),
    }
    config = model.config
    base = Base(
        config.encoder, config.layers, changed, config.wide, config.trunk, model.rounded, config.groups, config.centres
    )
    return checkpoint.write_checkpoint(directory, files, base, config.pools, config.text, metrics, parent, config.heads)
