"""NaN and infinite numbers in a checkpoint's files are found wherever they are."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.finite import NotFiniteError, check_numbers, check_onnx, check_weights
from depo_gateway.estimator.runtime import Runtime
from tests.estimator.poisoned import KINDS, poisoned, weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_such_numbers_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    name, change, message = KINDS[kind]
    place = poisoned(tiny_checkpoint, tmp_path / "bad", name, change)
    with pytest.raises(ValueError, match=rf"bad can't be used: {name}: .*{message}.*name another version$"):
        Runtime.load(place)


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_written(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    name, change, message = KINDS[kind]
    files = {each: (tiny_checkpoint / each).read_bytes() for each in checkpoint.FILES}
    manifest = checkpoint.load_manifest(tiny_checkpoint)
    with pytest.raises(NotFiniteError, match=message):
        checkpoint.write_checkpoint(
            tmp_path / "bad", {**files, name: change(files[name])}, manifest.base, manifest.pools, manifest.text, {}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_large_finite_weights_of_every_type_are_taken(tiny_checkpoint: Path, kind: str) -> None:
    check_weights(weights(6e4, kind)((tiny_checkpoint / checkpoint.WEIGHTS).read_bytes()), "weights")


def test_whole_numbers_and_metadata_are_no_matter() -> None:
    check_weights(safetensors.numpy.save({"a": np.array([2**31 - 1, -1], np.int32)}, {"format": "pt"}), "weights")
    check_weights(safetensors.numpy.save({}), "weights")


@pytest.mark.parametrize("header", [b"", b"not one", b"[1,2]", b"{", b'{"a":1}', b'{"a":{"dtype":"F32"}}'])
def test_what_is_no_safetensors_file_is_called_so(header: bytes) -> None:
    with pytest.raises(ValueError, match="weights is not a safetensors file"):
        check_weights(len(header).to_bytes(8, "little") + header, "weights")


def graph(*tensors: onnx.TensorProto, constant: onnx.TensorProto | None = None) -> bytes:
    nodes = [] if constant is None else [helper.make_node("Constant", [], ["c"], value=constant)]
    made = helper.make_model(helper.make_graph(nodes, "g", [], [], list(tensors)))
    serialized: bytes = made.SerializeToString()
    return serialized


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_every_floating_point_type_of_onnx_is_read(kind: int) -> None:
    half: dict[int, bytes] = {TensorProto.FLOAT16: b"\0\x7e\0\0", TensorProto.BFLOAT16: b"\xc0\x7f\0\0"}
    raw = half.get(kind) or np.array([np.nan, 0.0], "<f8" if kind == TensorProto.DOUBLE else "<f4").tobytes()
    bad = TensorProto(data_type=kind, dims=[2], name="w", raw_data=raw)
    with pytest.raises(NotFiniteError, match=r"model\.onnx: w holds NaN"):
        check_onnx(graph(bad), "model.onnx")
    with pytest.raises(NotFiniteError, match=r"model\.onnx: w holds NaN"):
        check_onnx(graph(constant=bad), "model.onnx")
    check_onnx(graph(TensorProto(data_type=kind, dims=[2], name="w", raw_data=bytes(len(raw)))), "model.onnx")


def test_a_masks_constant_may_be_infinite_but_not_nan() -> None:
    check_onnx(graph(constant=helper.make_tensor("mask", TensorProto.FLOAT, [], [float("-inf")])), "model.onnx")
    with pytest.raises(NotFiniteError, match="mask holds NaN"):
        check_onnx(graph(constant=helper.make_tensor("mask", TensorProto.FLOAT, [], [float("nan")])), "model.onnx")


def test_int8_weights_of_any_bits_are_finite() -> None:
    check_onnx(graph(TensorProto(data_type=TensorProto.INT8, dims=[4], name="q", raw_data=b"\xff" * 4)), "model.onnx")


def test_a_file_that_ends_too_early_is_no_model(tiny_checkpoint: Path) -> None:
    whole = (tiny_checkpoint / checkpoint.ENCODER).read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 3):
        with pytest.raises(ValueError, match=r"model\.onnx is not an ONNX model"):
            check_onnx(whole[:end], "model.onnx")


def test_numbers_of_json_are_named_by_their_place() -> None:
    check_numbers(json.loads('{"a": [1, 2.5, null, "NaN", true]}'), "file")
    with pytest.raises(NotFiniteError, match=r"file: a\[1\]\.b is nan"):
        check_numbers(json.loads('{"a": [1, {"b": NaN}]}'), "file")
