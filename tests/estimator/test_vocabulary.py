import json

import pytest
import torch
from tokenizers import Tokenizer, models

from estimator.model import DEFAULT_ENCODER, ModelConfig, create, locate
from estimator.text import TextConfig
from estimator.vocabulary import narrow, narrowed

if locate(DEFAULT_ENCODER) == DEFAULT_ENCODER:
    pytest.skip("needs the encoder's weights package", allow_module_level=True)


def test_the_domains_texts_read_as_before_and_others_fall_apart_into_characters() -> None:
    model, whole = create(ModelConfig(("a", "b"), TextConfig(), layers=1))
    texts = ["3+4*9-2=", "What is the capital of France?"]
    kept = narrowed(whole, texts)
    assert kept.get_vocab_size() < 500
    for text in texts:
        assert kept.encode(text).tokens == whole.encode(text).tokens
    assert kept.encode("capitals").tokens == ["[CLS]", "capital", "##s", "[SEP]"]
    assert "[UNK]" not in kept.encode("Zürich v8.3 (of_x)").tokens
    ids, kept_ids = (torch.tensor([t.encode(texts[1]).ids]) for t in (whole, kept))
    with torch.no_grad():
        before = model.embed(ids, torch.ones_like(ids))
        narrow(model.encoder, whole, kept)
        after = model.embed(kept_ids, torch.ones_like(kept_ids))
    assert torch.equal(before, after)


def test_what_can_not_be_narrowed_is_said() -> None:
    with pytest.raises(ValueError, match="only a WordPiece vocabulary can be narrowed, and this encoder's is BPE"):
        narrowed(Tokenizer(models.BPE()), [])
    model, whole = create(ModelConfig(("a", "b"), TextConfig(), layers=1))
    settings = json.loads(narrowed(whole, []).to_str())
    settings["model"]["vocab"]["qqq"] = len(settings["model"]["vocab"])
    with pytest.raises(ValueError, match="'qqq', which the encoder does not know"):
        narrow(model.encoder, whole, Tokenizer.from_str(json.dumps(settings)))
