"""Converts a Hugging Face Llama directory with a byte-level BPE tokenizer into a GGUF file for llama.cpp.

It supports only what the demo's two models need; for other models use llama.cpp's convert_hf_to_gguf.py.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, target: Path) -> None:
    """Writes `target` from config.json, model.safetensors and the tokenizer's files. Matrices become float16."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    heads = config["num_attention_heads"]
    writer.add_name(f"depo-demo-{folder.name}")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, folder, config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _add_tensor(writer, name, tensor.float().numpy(), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, int]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for _, index in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(settings["chat_template"])


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], heads: int) -> None:
    """Adds a tensor. Tied embeddings need no output matrix: llama.cpp uses the input's."""
    if name == "model.embed_tokens.weight":
        writer.add_tensor("token_embd.weight", values.astype(np.float16))
    elif name == "model.norm.weight":
        writer.add_tensor("output_norm.weight", values)
    else:
        _, _, layer, *middle, _ = name.split(".")
        part = ".".join(middle)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            values = _interleaved(values, heads)
        as_half = values.ndim == 2
        writer.add_tensor(f"blk.{layer}.{_NAMES[part]}.weight", values.astype(np.float16) if as_half else values)


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorders rotary pairs: Hugging Face pairs row i of a head with i + half, llama.cpp row 2i with 2i + 1."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))
