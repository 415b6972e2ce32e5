"""Estimator -> the files of a checkpoint: int8 ONNX of the deep part, weights, tokenizer. Torch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from estimator import calibration, checkpoint
from estimator.calibration import Calibration
from estimator.checkpoint import Base, Manifest
from estimator.model import DeepPart, Estimator, weights_of

HEAD = "model.deep_weight"


def onnx_bytes(model: Estimator) -> bytes:
    """The deep part as ONNX, its matrices and embedding table int8, any batch size and length.

    Weights keep 7 bits (reduce_range): on processors without VNNI the 8-bit products would saturate. A scale per column
    makes up for it.
    """
    ids, mask = torch.randint(0, 100, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    axes = {0: "prompts", 1: "tokens"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but 1 s where the new one takes 12, and as exact.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="Exporting aten::index operator")  # parity is tested
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            DeepPart(model).eval(),
            (ids, mask),
            str(plain),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "prompts"}},
            opset_version=17,
            dynamo=False,
        )
        head = [n.name for n in onnx.load(plain).graph.node if n.op_type == "MatMul" and HEAD in n.input]
        quiet = logging.getLogger()
        level = quiet.level
        quiet.setLevel(
            logging.ERROR
        )  # quantize_dynamic warns on the root logger that it was not given pre-processed input
        try:
            quantize_dynamic(
                str(plain),
                str(small),
                op_types_to_quantize=["MatMul", "Gather", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=head,  # a few hundred numbers on which every answer rests
            )
        finally:
            quiet.setLevel(level)
        return small.read_bytes()


def write(
    directory: Path,
    model: Estimator,
    tokenizer: Tokenizer,
    calibrated: Calibration,
    metrics: Mapping[str, Any],
    trained: Sequence[str] = (),
    parent: str | None = None,
) -> Manifest:
    """Export a model and write it as a checkpoint. `trained` names the encoder's tensors that differ from its base."""
    files = {
        checkpoint.WEIGHTS: weights_of(model, trained),
        checkpoint.TOKENIZER: tokenizer.to_str().encode(),
        checkpoint.ENCODER: onnx_bytes(model),
        checkpoint.CALIBRATION: calibration.dumps(calibrated),
    }
    base = Base(model.config.encoder, model.config.layers, tuple(trained))
    return checkpoint.write(directory, files, base, model.config.pools, model.config.text, metrics, parent)
