"""Checkpoints of which one file holds NaN or infinite numbers: what a diverged training of another version left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import helper, numpy_helper

from depo_gateway.estimator import checkpoint

Change = Callable[[bytes], bytes]


def poisoned(tiny: Path, place: Path, name: str, change: Change) -> Path:
    """A copy of `tiny` with one file changed and its hash in the manifest."""
    shutil.copytree(tiny, place)
    data = change((tiny / name).read_bytes())
    (place / name).write_bytes(data)
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = checkpoint.sha256(data)
    manifest["version"] += "-bad"
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return place


def weights(value: float, kind: str = "float32", name: str = "wide_weight") -> Change:
    """One number of a tensor is `value`; the tensor is stored as `kind`."""

    def change(data: bytes) -> bytes:
        tensors = safetensors.numpy.load(data)
        tensor = tensors[name].astype(np.float32)
        tensor.reshape(-1)[-1] = value
        tensors[name] = tensor.astype(np.float16 if kind == "float16" else np.float32)
        if kind != "bfloat16":
            return safetensors.numpy.save(tensors)
        tensors[name] = (tensor.view(np.uint32) >> 16).astype(np.uint16)
        plain = safetensors.numpy.save(tensors)
        length = int.from_bytes(plain[:8], "little")
        header = json.loads(plain[8 : 8 + length])
        header[name]["dtype"] = "BF16"
        text = json.dumps(header).encode().ljust(length)
        return len(text).to_bytes(8, "little") + text + plain[8 + length :]

    return change


def encoder(value: float, packed: bool = False) -> Change:
    """One weight of the graph is `value`; stored as raw bytes, or as a packed field of floats."""

    def change(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        tensor = max(model.graph.initializer, key=lambda item: item.data_type == onnx.TensorProto.FLOAT)
        values = numpy_helper.to_array(tensor).astype(np.float32).copy()
        values.reshape(-1)[0] = value
        if packed:
            fresh = helper.make_tensor(tensor.name, onnx.TensorProto.FLOAT, values.shape, values.reshape(-1).tolist())
        else:
            fresh = numpy_helper.from_array(values, tensor.name)
        tensor.CopyFrom(fresh)
        serialized: bytes = model.SerializeToString()
        return serialized

    return change


def calibration(where: Callable[[Any], None]) -> Change:
    def change(data: bytes) -> bytes:
        raw = json.loads(data)
        where(raw)
        return json.dumps(raw).encode()

    return change


def infinite_slope(raw: Any) -> None:
    raw["stages"]["full"]["quality"][0]["slope"] = float("inf")


def nan_curve(raw: Any) -> None:
    curve = {"thresholds": [0.0, 1.0], "shares": [[1.0, 0.0], [float("nan"), 1.0]], "quality": None}
    raw["curves"]["gain"] = curve


def infinite_target(raw: Any) -> None:
    raw["targets"]["large-share=0.3"] = {"gain": float("-inf")}


KINDS: dict[str, tuple[str, Change, str]] = {
    "weights NaN": (checkpoint.WEIGHTS, weights(float("nan")), "wide_weight holds NaN"),
    "weights infinite fp16": (checkpoint.WEIGHTS, weights(float("inf"), "float16"), "wide_weight holds NaN"),
    "weights NaN bf16": (checkpoint.WEIGHTS, weights(float("nan"), "bfloat16"), "wide_weight holds NaN"),
    "bias -inf": (checkpoint.WEIGHTS, weights(float("-inf"), name="bias"), "bias holds NaN"),
    "encoder NaN": (checkpoint.ENCODER, encoder(float("nan")), "holds NaN or infinite weights"),
    "encoder infinite": (checkpoint.ENCODER, encoder(float("inf"), packed=True), "holds NaN or infinite weights"),
    "slope": (checkpoint.CALIBRATION, calibration(infinite_slope), r"stages\.full\.quality\[0\]\.slope is inf"),
    "curve": (checkpoint.CALIBRATION, calibration(nan_curve), r"curves\.gain\.shares\[1\]\[0\] is nan"),
    "target": (checkpoint.CALIBRATION, calibration(infinite_target), r"targets\.large-share=0\.3\.gain is -inf"),
    "1e999": (checkpoint.CALIBRATION, lambda data: data.replace(b"1.0", b"1e999", 1), "is inf"),
}
