"""The model on a real two-layer encoder: what it reads, what it keeps, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
)

from depo_gateway.estimator import checkpoint, model
from depo_gateway.estimator.model import ModelConfig, collate, create_model
from depo_gateway.estimator.text import Prepared, TextConfig

POOLS = ("small", "large")


def config(encoder: Path, pooling: str = "cls", layers: int = 0, max_tokens: int = 32) -> ModelConfig:
    return ModelConfig(POOLS, TextConfig(pooling=pooling, max_tokens=max_tokens), str(encoder), layers)


def test_padding_does_not_change_a_prompt(tiny_encoder: Path) -> None:
    short, long = Prepared((2, 5, 6, 3), False, ()), Prepared((2, *range(5, 25), 3), False, ())
    for pooling in ("cls", "mean"):
        built, _ = create_model(config(tiny_encoder, pooling))
        built.eval()
        with torch.no_grad():
            alone, beside = built.embed(*collate([short])), built.embed(*collate([short, long]))
        assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_mean_and_cls_read_different_things(tiny_encoder: Path) -> None:
    ids, mask = collate([Prepared((2, 5, 6, 3), False, ())])
    (built, _), (mean, _) = create_model(config(tiny_encoder)), create_model(config(tiny_encoder, "mean"))
    with torch.no_grad():
        hidden = built.eval().encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.allclose(built.embed(ids, mask), hidden[:, 0])
        assert torch.allclose(mean.eval().embed(ids, mask), hidden.mean(1), atol=1e-6)


def test_an_encoder_can_be_trimmed(tiny_encoder: Path) -> None:
    built, _ = create_model(config(tiny_encoder, layers=1))
    names = {name for name, _ in built.encoder.named_parameters()}
    assert any("layer.0." in name for name in names)
    assert not any("layer.1." in name or "pooler" in name for name in names)
    with pytest.raises(ValueError, match="layers is 7, but the encoder has 2"):
        create_model(config(tiny_encoder, layers=7))


def test_other_encoders_are_read_whole_and_cut_where_their_layers_are_known(tiny_encoder: Path, tmp_path: Path) -> None:
    size = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    ids, mask = collate([Prepared((2, 5, 6, 3), False, ())])
    for made in (
        DistilBertModel(DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
        ModernBertModel(ModernBertConfig(num_hidden_layers=2, pad_token_id=0, **size)),
        AlbertModel(AlbertConfig(embedding_size=16, **size)),
    ):
        place = tmp_path / type(made).__name__
        shutil.copytree(tiny_encoder, place)
        made.save_pretrained(place)
        whole, _ = create_model(config(place))
        assert whole.eval().embed(ids, mask).shape == (1, 32)
        if isinstance(made, AlbertModel):
            with pytest.raises(ValueError, match="AlbertModel' can't be cut to 1 layers; use layers 0"):
                create_model(config(place, layers=1))
        else:
            assert create_model(config(place, layers=1))[0].eval().embed(ids, mask).shape == (1, 32)
        short, long = Prepared((2, 5, 6, 3), False, ()), Prepared((2, *range(5, 25), 3), False, ())
        with torch.no_grad():
            alone, beside = whole.embed(*collate([short])), whole.embed(*collate([short, long]))
        assert torch.allclose(alone[0], beside[0], atol=1e-5)
    with pytest.raises(ValueError, match="layers is -1"):
        create_model(config(tiny_encoder, layers=-1))


def test_an_encoder_that_is_not_there_or_reads_less_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be loaded"):
        create_model(config(tmp_path))
    with pytest.raises(ValueError, match="reads at most 512"):
        create_model(config(tiny_encoder, max_tokens=600))


def test_a_checkpoint_loads_again_for_training(tiny_checkpoint: Path) -> None:
    loaded, tokenizer, manifest = model.load_model(tiny_checkpoint)
    assert manifest.pools == POOLS
    assert loaded.wide_weight.abs().sum() > 0
    assert tokenizer.get_vocab_size() == len(loaded.idf) - 2**16


def test_an_encoder_is_rounded_to_int8_only_where_it_will_be_stored_so(tiny_encoder: Path) -> None:
    exact, rounded = (create_model(config(tiny_encoder), rounded=rounded)[0] for rounded in (False, True))
    stored = dict(AutoModel.from_pretrained(tiny_encoder).named_parameters())
    for name, parameter in exact.encoder.named_parameters():
        assert torch.equal(parameter, stored[name])
    assert not torch.equal(
        rounded.encoder.embeddings.word_embeddings.weight, stored["embeddings.word_embeddings.weight"]
    )


def test_a_part_of_the_pools_predicts_what_the_whole_does_for_them(tiny_encoder: Path) -> None:
    torch.manual_seed(0)
    ids, mask = collate([Prepared((2, 5, 6, 3), False, ())])
    for wide, trunk in ((True, False), (True, True), (False, True), (False, False)):
        whole, _ = create_model(
            ModelConfig(("a", "b", "c"), TextConfig(max_tokens=32), str(tiny_encoder), 0, wide, trunk)
        )
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if not name.startswith("encoder."):
                    parameter.normal_()
        part = model.select_pools(whole.eval(), ("c", "a"))
        assert part.config.pools == ("c", "a")
        assert part.encoder is whole.encoder
        assert not part.training
        embedding = whole.embed(ids, mask)
        assert torch.allclose(part.deep(embedding), whole.deep(embedding)[:, [4, 5, 0, 1]])
        if wide:
            bag = (torch.tensor([3, 9]), torch.tensor([0]), torch.ones(2), torch.ones(1, 18))
            assert torch.allclose(part.wide(*bag), whole.wide(*bag)[:, [4, 5, 0, 1]])
        else:
            assert not [name for name in part.state_dict() if name.startswith(("idf", "surface", "wide"))]
    with pytest.raises(ValueError, match="has no pool 'd'; it has a, b, c"):
        model.select_pools(whole, ("a", "d"))


def test_weights_that_do_not_fit_the_manifest_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _, files = checkpoint.load_checkpoint(tiny_checkpoint)
    manifest = checkpoint.load_manifest(tiny_checkpoint)
    base = checkpoint.Base(manifest.base.encoder, manifest.base.layers, ("encoder.encoder.layer.0.nothing",))
    checkpoint.write_checkpoint(tmp_path / "odd", files, base, manifest.pools, manifest.text, {})
    with pytest.raises(ValueError, match=r"does not fit its manifest, see encoder\.encoder\.layer\.0\.nothing"):
        model.load_model(tmp_path / "odd")
    assert json.loads((tmp_path / "odd" / "manifest.json").read_text())["schema"] == 1
