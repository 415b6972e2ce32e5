"""What is read of a request, and that a long prompt costs no more than a screenful."""

import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from estimator.text import SURFACE, TextConfig, load_tokenizer, prepare, prompt_of_messages, surface_features

CONFIG = TextConfig(max_tokens=16)


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Tokenizer:
    return load_tokenizer((tiny_encoder / "tokenizer.json").read_text())


def test_the_last_user_turn_is_the_prompt_and_the_rest_its_context() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "tool", "content": "an earlier tool result"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "a very long tool result"},
    ]
    assert prompt_of_messages(messages) == ("second", "first\nanswer")


def test_messages_without_a_user_turn_have_no_prompt() -> None:
    assert prompt_of_messages([]) == ("", "")
    assert prompt_of_messages([{"role": "system", "content": "x"}, {"role": "user", "content": 3}]) == ("", "")


def test_a_short_prompt_is_kept_whole(tokenizer: Tokenizer) -> None:
    prepared = prepare(tokenizer, CONFIG, "what is the sum")
    assert [tokenizer.id_to_token(i) for i in prepared.ids] == ["[CLS]", "what", "is", "the", "sum", "[SEP]"]
    assert not prepared.truncated


def test_a_long_prompt_keeps_head_and_tail(tokenizer: Tokenizer) -> None:
    prepared = prepare(tokenizer, CONFIG, "one two three " + "the " * 50 + "prove hello again")
    tokens = [tokenizer.id_to_token(i) for i in prepared.ids]
    assert len(tokens) == 16
    assert tokens[:4] == ["[CLS]", "one", "two", "three"]
    assert tokens[-4:] == ["prove", "hello", "again", "[SEP]"]
    assert prepared.truncated


def test_context_fills_the_room_left_newest_last(tokenizer: Tokenizer) -> None:
    prepared = prepare(tokenizer, CONFIG, "what is the sum", "one " * 30 + "two three")
    tokens = [tokenizer.id_to_token(i) for i in prepared.ids]
    assert tokens[:6] == ["[CLS]", "what", "is", "the", "sum", "[SEP]"]
    assert tokens[-3:] == ["two", "three", "[SEP]"]
    assert len(tokens) == 16
    assert not prepared.truncated
    full = prepare(tokenizer, CONFIG, "the " * 14, "one two")
    assert len(full.ids) == 16
    assert "one" not in [tokenizer.id_to_token(i) for i in full.ids]


def test_four_megabytes_cost_no_more_than_a_screenful(tokenizer: Tokenizer) -> None:
    def seconds(text: str) -> float:
        best = 1.0
        for _ in range(5):
            started = time.perf_counter()
            prepare(tokenizer, CONFIG, text)
            best = min(best, time.perf_counter() - started)
        return best

    long = "what is the sum " * 250_000
    assert prepare(tokenizer, CONFIG, long).truncated
    assert seconds(long) < 10 * seconds(long[:400]) + 0.001


@pytest.mark.parametrize("text", ["", " ", "\x00", "😀" * 500, "\ud800", "a" * 5000, "\n" * 5000])
def test_odd_text_is_read_all_the_same(tokenizer: Tokenizer, text: str) -> None:
    for prepared in (prepare(tokenizer, CONFIG, text), prepare(tokenizer, CONFIG, "one", text)):
        assert 2 <= len(prepared.ids) <= 16
        assert len(prepared.surface) == len(SURFACE)


def test_a_special_token_in_a_prompt_is_text(tokenizer: Tokenizer) -> None:
    for special in ("[SEP]", "[CLS]", "[PAD]"):
        first, *others = special[1:-1].lower()
        read = ["[", first, *(f"##{letter}" for letter in others), "]"]
        alone, after = prepare(tokenizer, CONFIG, special), prepare(tokenizer, CONFIG, "one", special)
        assert [tokenizer.id_to_token(i) for i in alone.ids] == ["[CLS]", *read, "[SEP]"]
        assert [tokenizer.id_to_token(i) for i in after.ids] == ["[CLS]", "one", "[SEP]", *read, "[SEP]"]


def test_surface_features_count_what_their_names_say() -> None:
    seen = dict(zip(SURFACE, surface_features("Which is NOT $x^2$?\nA. 10\nB. é\nAnswer:"), strict=True))
    assert seen["options"] == 2.0
    assert seen["answer_cue"] == 1.0
    assert seen["digits"] == pytest.approx(1.3863, abs=1e-4)  # log(1 + 3)
    assert seen["dollars"] == pytest.approx(1.0986, abs=1e-4)
    assert seen["lines"] == pytest.approx(1.3863, abs=1e-4)
    assert seen["other_scripts"] > 0
    assert seen["negations"] > 0
    assert seen["fences"] == 0.0


def test_settings_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="pooling 'max' is unknown"):
        TextConfig(pooling="max")
    with pytest.raises(ValueError, match="template"):
        TextConfig(template="{prompt}")
    with pytest.raises(ValueError, match="max_tokens is 4"):
        TextConfig(max_tokens=4)
