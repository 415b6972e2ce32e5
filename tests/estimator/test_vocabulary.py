import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors

from depo_gateway.estimator import export
from depo_gateway.estimator.calibration import STAGES, Calibration
from depo_gateway.estimator.model import ModelConfig, collate, create_model, load_model
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import TextConfig, prepare
from depo_gateway.estimator.vocabulary import narrow_embeddings, narrow_tokenizer
from tests.stages import uncalibrated_stage


def test_the_domains_texts_read_as_before_and_others_fall_apart_into_characters() -> None:
    model, whole = create_model(ModelConfig(("a", "b"), TextConfig(), layers=1))
    texts = ["3+4*9-2=", "What is the capital of France?"]
    kept = narrow_tokenizer(whole, texts)
    assert kept.get_vocab_size() < 500
    for text in texts:
        assert kept.encode(text).tokens == whole.encode(text).tokens
    assert kept.encode("capitals").tokens == ["[CLS]", "capital", "##s", "[SEP]"]
    assert "[UNK]" not in kept.encode("Zürich v8.3 (of_x)").tokens
    ids, kept_ids = (torch.tensor([t.encode(texts[1]).ids]) for t in (whole, kept))
    with torch.no_grad():
        before = model.embed(ids, torch.ones_like(ids))
        narrow_embeddings(model.encoder, whole, kept)
        after = model.embed(kept_ids, torch.ones_like(kept_ids))
    assert torch.equal(before, after)


def test_a_vocabulary_that_can_not_be_narrowed_is_an_error() -> None:
    with pytest.raises(ValueError, match="only a WordPiece vocabulary can be narrowed, and this encoder's is BPE"):
        narrow_tokenizer(Tokenizer(models.BPE()), [])
    model, whole = create_model(ModelConfig(("a", "b"), TextConfig(), layers=1))
    settings = json.loads(narrow_tokenizer(whole, []).to_str())
    settings["model"]["vocab"]["qqq"] = len(settings["model"]["vocab"])
    with pytest.raises(ValueError, match="'qqq', which the encoder does not know"):
        narrow_embeddings(model.encoder, whole, Tokenizer.from_str(json.dumps(settings)))


def test_special_tokens_keep_their_place_whatever_adds_them() -> None:
    _, whole = create_model(ModelConfig(("a", "b"), TextConfig(), layers=1))
    sep, cls = (whole.token_to_id(name) for name in ("[SEP]", "[CLS]"))
    for processor in (
        processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls)),
        processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", cls), ("[SEP]", sep)]),
    ):
        other = Tokenizer.from_str(whole.to_str())
        other.post_processor = processor
        kept = narrow_tokenizer(other, ["the capital \ud800"])
        ids = kept.encode("the capital").ids
        assert [kept.id_to_token(i) for i in ids] == ["[CLS]", "the", "capital", "[SEP]"]
    other.post_processor = processors.Sequence([processor])
    with pytest.raises(ValueError, match="post-processor Sequence is not supported"):
        narrow_tokenizer(other, [])


def test_a_narrowed_checkpoint_serves_and_trains_on(tmp_path: Path) -> None:
    texts = [f"{i % 10}+{i // 10}=" for i in range(100)]
    config = ModelConfig(("a", "b"), TextConfig(max_tokens=32), layers=1)
    _, whole = create_model(config)
    model, tokenizer = create_model(config, narrow_tokenizer(whole, texts))
    with torch.no_grad():
        model.deep_weight.normal_()
    stages = dict.fromkeys(STAGES, uncalibrated_stage(2))
    export.export_checkpoint(tmp_path / "made", model, tokenizer, Calibration(("a", "b"), stages, {}), {})
    assert sum(file.stat().st_size for file in (tmp_path / "made").iterdir()) < 4e6
    again, read, _ = load_model(tmp_path / "made")
    prepared = [prepare(read, config.text, text) for text in texts]
    with torch.no_grad():
        deep_BH = again.deep(again.embed(*collate(prepared)))
    runtime = Runtime.load(tmp_path / "made")
    served_BH = runtime.full_logits([runtime.prepare(text) for text in texts])
    assert np.corrcoef(deep_BH.flatten(), (served_BH - runtime.cheap_logits(prepared)).flatten())[0, 1] > 0.99
