"""An encoder that is read from a checkpoint's ONNX file is the one that was exported, bit for bit."""

from pathlib import Path

import onnx
import pytest
import torch

from depo_gateway.estimator import export
from depo_gateway.estimator.exported_encoder import read_exported_encoder
from depo_gateway.estimator.model import Estimator, ModelConfig, collate, create_model
from depo_gateway.estimator.text import Prepared, TextConfig


def tiny_model(tiny_encoder: Path, trunk: bool = False) -> Estimator:
    config = ModelConfig(
        ("small", "large"), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide=not trunk, trunk=trunk
    )
    return create_model(config, rounded=not trunk)[0]


@pytest.mark.parametrize("trunk", [False, True])
def test_it_is_the_encoder_that_was_exported(tiny_encoder: Path, trunk: bool) -> None:
    built = tiny_model(tiny_encoder, trunk)
    with torch.no_grad():
        built.encoder.get_parameter("encoder.layer.1.output.dense.weight").normal_()  # trained: stored in fp32
        built.encoder.get_parameter("embeddings.word_embeddings.weight")[:, 0] += 1.0
    read = read_exported_encoder(export.onnx_bytes(built), heads=2)
    assert read is not None
    stored, expected = read.state_dict(), built.encoder.state_dict()
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    ids, mask = collate([Prepared((2, 5, 6, 3), False, ()), Prepared((2, *range(5, 25), 3), False, ())])
    with torch.no_grad():
        hidden = [encoder(input_ids=ids, attention_mask=mask)[0] for encoder in (read, built.encoder.eval())]
    assert torch.equal(*hidden)


def test_reading_draws_no_random_numbers(tiny_checkpoint: Path) -> None:
    serialized = (tiny_checkpoint / "model.onnx").read_bytes()
    before = torch.get_rng_state()
    assert read_exported_encoder(serialized, heads=2) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("missing", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_a_file_that_lacks_a_tensor_is_not_read(tiny_checkpoint: Path, missing: str) -> None:
    exported = onnx.load(tiny_checkpoint / "model.onnx")
    for node in exported.graph.node:
        node.output[:] = ["other" if name == f"model.encoder.{missing}" else name for name in node.output]
    for tensor in exported.graph.initializer:
        tensor.name = tensor.name.replace(f"model.encoder.{missing}", "other")
    assert read_exported_encoder(exported.SerializeToString(), heads=2) is None
