"""Refuses a checkpoint's files that hold NaN or infinite numbers: none of their predictions could be trusted. No torch.

Weights are read from safetensors' own header, so that bfloat16, which numpy does not know, is checked too. Of
model.onnx only those parts of protobuf are read that lead to tensors
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAFETENSORS_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
ONNX_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8", 16: "bfloat16"}  # TensorProto.DataType
# Numbers of protobuf's fields
GRAPH, NODE, INITIALIZER, ATTRIBUTE, TENSOR = 7, 1, 5, 5, 5
DATA_TYPE, FLOAT_DATA, NAME, RAW_DATA, DOUBLE_DATA = 2, 4, 8, 9, 10
VARINT, FIXED_64, LENGTH_DELIMITED, FIXED_32 = 0, 1, 2, 5  # wire types


class NotFiniteError(ValueError):
    """A checkpoint's file holds NaN or infinite numbers. The message is one sentence that names the file."""


def check_weights(data: bytes, file: str) -> None:
    """Checks every tensor of a safetensors file.

    Raises:
        NotFiniteError: a tensor holds NaN or infinite numbers.
        ValueError: it is no safetensors file.
    """
    length = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:length])
        tensors = {name: (t["dtype"], *t["data_offsets"]) for name, t in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} is not a safetensors file") from None
    body = memoryview(data)[length:]
    for name, (kind, start, end) in tensors.items():
        numbers = _floats(body[start:end], SAFETENSORS_FLOATS.get(kind))
        if not np.isfinite(numbers).all():
            raise NotFiniteError(f"{file}: {name} holds NaN or infinite weights")


def check_onnx(data: bytes, file: str) -> None:
    """Checks every weight of an ONNX graph. A single infinite number is allowed: masks use such constants.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        ValueError: it is no protobuf message.
    """
    try:
        for tensor in _onnx_tensors(memoryview(data)):
            name, numbers = _onnx_numbers(tensor)
            finite = np.isfinite(numbers)
            if not finite.all() and (len(numbers) > 1 or np.isnan(numbers).any()):
                raise NotFiniteError(f"{file}: {name} holds NaN or infinite weights")
    except IndexError:
        raise ValueError(f"{file} is not an ONNX model: it ends too early") from None


def check_numbers(value: Any, file: str, place: str = "") -> None:
    """Raises NotFiniteError for NaN or infinite numbers anywhere in plain JSON values."""
    if isinstance(value, float) and not math.isfinite(value):
        raise NotFiniteError(f"{file}: {place or 'its value'} is {value}")
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(inner, file, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_numbers(inner, file, f"{place}[{index}]")


def _floats(raw: memoryview, kind: str | None) -> NDArray[np.floating]:
    """The floating-point numbers in raw bytes; none where they hold whole numbers (None)."""
    if kind is None:
        return np.empty(0)
    if kind == "bfloat16":  # the upper half of a 32-bit float
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    numbers: NDArray[np.floating] = np.frombuffer(raw, kind)
    return numbers


def _onnx_tensors(model: memoryview) -> Iterator[memoryview]:
    """The initializers of a model's graph, and the tensors in its nodes' attributes."""
    for graph in _messages(model, GRAPH):
        yield from _messages(graph, INITIALIZER)
        for node in _messages(graph, NODE):
            for attribute in _messages(node, ATTRIBUTE):
                yield from _messages(attribute, TENSOR)


def _onnx_numbers(tensor: memoryview) -> tuple[str, NDArray[np.floating]]:
    """A TensorProto's name and floating-point numbers."""
    kind, name, values = 0, "", []
    for field, value in _fields(tensor):
        if field == DATA_TYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, memoryview) and field == NAME:
            name = bytes(value).decode(errors="replace")
        elif isinstance(value, memoryview) and field in (RAW_DATA, FLOAT_DATA, DOUBLE_DATA):
            values.append((field, value))
    kinds = {RAW_DATA: ONNX_FLOATS.get(kind), FLOAT_DATA: "<f4", DOUBLE_DATA: "<f8"}
    parts = [_floats(value, kinds[field]) for field, value in values]
    return name or "a constant", np.concatenate(parts) if parts else np.empty(0)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _fields(message):
        if field == wanted and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """A message's fields: number, and whole number or bytes. Raises IndexError where it ends too early."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            number, position = _varint(message, position)
            yield field, number
            continue
        size = {FIXED_64: 8, FIXED_32: 4}.get(wire)
        if wire == LENGTH_DELIMITED:
            size, position = _varint(message, position)
        if size is None or position + size > len(message):
            raise IndexError
        yield field, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """(the number, the position after it)."""
    number = shift = 0
    while True:
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
