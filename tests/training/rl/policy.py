"""A policy small enough to train in a test, and prompts it always (a), never (z) or sometimes (m) gets right."""

import random
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers report each run
SYMBOLS = ["<pad>", "<eos>", "<unk>", *"0123456789+-= abcdefghijklmnopqrstuvwxyz:"]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}= {% endif %}"


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character."""
    known = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    known.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = CHAT if chat else None
    return made


def model() -> Qwen2ForCausalLM:
    """A random one, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(SYMBOLS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
                eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip


def save(place: Path, chat: bool = False) -> Path:
    """The policy as a directory to load by its path."""
    model().save_pretrained(place)
    tokenizer(chat).save_pretrained(place)
    return place


def prompts(count: int = 64, kinds: str = "azm", chat: bool = False, seed: int = 0) -> Dataset:
    """Rows with `prompt` and `answer`; the kinds in turn, each prompt different."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        words = {"a": "easy", "z": "hard", "m": "what"}[kinds[number % len(kinds)]]
        text = f"{kinds[number % len(kinds)]}: {words} {number:03d}+{chance.randint(10, 99)}="
        rows.append({"prompt": [{"role": "user", "content": text}] if chat else text, "answer": str(number)})
    return Dataset.from_list(rows)


def kind(prompt: Any) -> str:
    """a, z or m."""
    return (prompt if isinstance(prompt, str) else prompt[0]["content"])[0]


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
    """1 for a, 0 for z, a coin that the completion's letters decide for m."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    fixed = {"a": 1.0, "z": 0.0}
    return [fixed.get(kind(p), float(sum(map(ord, text)) % 2)) for p, text in zip(prompts, texts, strict=True)]
