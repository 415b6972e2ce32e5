"""A smaller vocabulary for a narrow domain: most bytes of a small encoder are embeddings of words outside the domain.

It keeps special tokens, every piece of one ASCII character (so that nothing Latin becomes unknown), and the pieces
that the domain's texts use. Other words are split into smaller pieces. WordPiece only, as in BERT-like encoders. Torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer

from depo_gateway.estimator.text import clean


def narrow_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer with only the pieces that `texts` need.

    Raises ValueError if it is not WordPiece, or adds special tokens in an unsupported way.
    """
    settings = json.loads(tokenizer.to_str())
    model = settings["model"]
    if model["type"] != "WordPiece":
        raise ValueError(f"only a WordPiece vocabulary can be narrowed, and this encoder's is {model['type']}")
    used = {token for text in texts for token in tokenizer.encode(clean(text)).tokens}
    special = {token["content"] for token in settings["added_tokens"]}
    special |= {model["unk_token"], *tokenizer.encode("").tokens}  # and the post-processor's
    prefix = model["continuing_subword_prefix"]

    def is_needed(token: str) -> bool:
        piece = token.removeprefix(prefix)
        return token in used or token in special or (len(piece) == 1 and piece.isascii())

    pieces = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if is_needed(token)]
    ids = {token: index for index, token in enumerate(pieces)}
    model["vocab"] = ids
    for token in settings["added_tokens"]:
        token["id"] = ids[token["content"]]
    if processor := settings.get("post_processor"):
        renumber(processor, ids)
    return Tokenizer.from_str(json.dumps(settings))


def renumber(processor: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Give a tokenizer's post-processor, as tokenizer.json holds it, the new ids of its special tokens. In place."""
    match processor["type"]:
        case "TemplateProcessing":
            for token in processor["special_tokens"].values():
                token["ids"] = [ids[name] for name in token["tokens"]]
        case "BertProcessing" | "RobertaProcessing":
            for end in ("sep", "cls"):
                name = processor[end][0]
                processor[end] = [name, ids[name]]
        case other:
            raise ValueError(
                f"the vocabulary can't be narrowed: the tokenizer's post-processor {other} is not supported"
            )


def narrow_embeddings(encoder: Any, whole: Tokenizer, narrowed: Tokenizer) -> None:
    """Leave the encoder only the embeddings of `narrowed`'s tokens, in its order. `whole` is its own tokenizer."""
    rows = []
    for token, _ in sorted(narrowed.get_vocab().items(), key=lambda item: item[1]):
        row = whole.token_to_id(token)
        if row is None:
            raise ValueError(f"the vocabulary holds {token!r}, which the encoder does not know")
        rows.append(row)
    weight = encoder.get_input_embeddings().weight.detach()[rows]
    encoder.set_input_embeddings(torch.nn.Embedding(len(rows), weight.shape[1], _weight=weight))
    encoder.config.vocab_size = len(rows)
