"""A small encoder for DEPO's estimator: a new BERT that reads characters, with random weights.

Two layers of a pretrained encoder (MiniLM) predicted no better here and cost seven times as much a step. The estimator
loads any encoder by name or directory; this one is a directory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHARACTERS = "0123456789+-*="


def save_encoder(place: Path, width: int = 64, layers: int = 2, seed: int = 0, characters: str = CHARACTERS) -> None:
    """Write the encoder and its tokenizer into the directory `place`; the weights depend on the seed alone."""
    logging.disable_progress_bar()
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(place)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            intermediate_size=4 * width,
            max_position_embeddings=64,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(place)
