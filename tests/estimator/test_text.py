"""What is read of a request, and that a long prompt costs no more than a screenful."""

import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from depo_gateway.estimator.text import (
    CHARS_PER_TOKEN,
    CHAT,
    SURFACE,
    TextConfig,
    extract_text,
    load_tokenizer,
    prepare,
    prompt_of_messages,
    render_chat,
    surface_features,
    with_special_tokens,
)

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
    with pytest.raises(ValueError, match="needs the policy's chat template"):
        TextConfig(template=CHAT)
    with pytest.raises(ValueError, match="a chat template is read with the text template"):
        TextConfig(chat="{{ messages }}")
    for broken in ("{% for m in messages %}{{ m.role }}", "{{ messages | shout }}", "a\n{% if %}"):
        with pytest.raises(ValueError, match=r"the chat template is not valid Jinja: line \d: [^\n]+$"):
            TextConfig(template=CHAT, chat=broken)


def test_a_manifest_without_a_chat_template_loads_as_before() -> None:
    assert TextConfig(**{"template": "[CLS] {prompt} [SEP] {context} [SEP]", "pooling": "cls", "max_tokens": 128}) == (
        TextConfig()
    )


# Chat templates, each in the manner of a family of models.

MARKED = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set seen.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + ('!' if loop.index0 == seen.last else '') + '\\n' }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADED = """\
{% macro head(role) %}<{{ role }}{{ eos_token }}>

{% endmacro %}
{{ bos_token }}
{% for message in messages %}
  {% if message['role'] == 'tool' %}{% break %}{% endif %}
  {{ head(message['role']) }}{{ message['content'].strip() }}{{ eos_token }}
{% endfor %}
{{ {'a': '<é>', 'b': [1]} | tojson }} {{ pad_token is defined }} {{ strftime_now('%Y') }}
{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}
"""
ALTERNATING = """

  {% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
<start>{{ 'model' if message['role'] == 'assistant' else message['role'] }} {{ message['content'] | trim }}<end>
{% endfor %}
{% if add_generation_prompt %}<start>model{% endif %}
"""
TURNS = [
    {"role": "user", "content": '  Prove: 1 < 2 & "x"\n'},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "{{ bos_token }} again"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("chat", [MARKED, HEADED, ALTERNATING])
def test_a_chat_is_written_as_transformers_writes_it(tiny_encoder: Path, chat: str, generation: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_encoder)
    tokenizer.add_special_tokens(
        {"bos_token": '<"b\\os">', "eos_token": "<eos é>", "additional_special_tokens": ["<x>"]}
    )
    tokenizer.chat_template = chat
    own = with_special_tokens(chat, tokenizer.special_tokens_map)
    for messages in (TURNS, TURNS[:1], [SYSTEM, *TURNS], [*TURNS, {"role": "tool", "content": "5"}], TURNS[1:]):

        def theirs(messages: list[dict[str, str]] = messages) -> Any:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)

        if chat is ALTERNATING and messages[0]["role"] != "user":
            for refusing in (theirs, lambda messages=messages: render_chat(own, messages, generation)):
                with pytest.raises(jinja2.TemplateError, match=r"alternate|not supported"):
                    refusing()
            continue
        assert render_chat(own, messages, generation) == theirs()
        if generation:
            assert extract_text(TextConfig(template=CHAT, chat=own), messages) == (theirs(), "")


def chatting(chat: str, max_tokens: int = 16) -> TextConfig:
    return TextConfig(template=CHAT, chat=with_special_tokens(chat, {"bos_token": "<s>"}), max_tokens=max_tokens)


def test_a_chat_template_reads_what_the_plain_one_leaves_out() -> None:
    plain, chat = TextConfig(), chatting(MARKED)
    for system in (SYSTEM, {"role": "system", "content": "Think."}):
        assert extract_text(plain, [system, *TURNS]) == prompt_of_messages(TURNS)
        assert system["content"] in extract_text(chat, [system, *TURNS])[0]
    for config in (plain, chat):
        assert extract_text(config, "a prompt") == ("a prompt", "")
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "now"}]
    assert "user!\nwhat\nnow<" in extract_text(chat, [{"role": "user", "content": parts}])[0]


@pytest.mark.parametrize(
    ("chat", "messages", "expected"),
    [
        (ALTERNATING, [SYSTEM, *TURNS[1:]], "Be brief.\né\n{{ bos_token }} again"),
        (ALTERNATING, [TURNS[1], {"role": "user", "content": None}], "é\n"),
        (MARKED, [], ""),  # messages[0] is undefined
        ("{{ messages[0].content + 1 }}", [TURNS[1]], "é"),
        ("{{ '{:d}'.format(messages[0].content) }}", [TURNS[1]], "é"),
        ("{{ messages.append(1) }}", [TURNS[1]], "é"),  # the sandbox's refusal
        ("{{ [][0].x }}", [{"role": 3, "content": {"a": 1}}, {}], "\n"),
    ],
)
def test_what_a_template_refuses_is_read_as_its_bare_turns(chat: str, messages: list[Any], expected: str) -> None:
    assert extract_text(chatting(chat), messages) == (expected, "")


def test_a_long_chat_is_cut_where_prepare_would_not_see_it(tokenizer: Tokenizer) -> None:
    """The same ids as of the whole conversation, at the cost of its two ends."""
    one_long = [SYSTEM, *TURNS, {"role": "assistant", "content": "the sum " * 900}, {"role": "user", "content": "why"}]
    many = [SYSTEM, *({"role": "user" if i % 2 == 0 else "assistant", "content": f"one {i}"} for i in range(901))]
    for messages in (one_long, many, many[1:], many[:-1], [{"role": "user", "content": "hard " * 9999}]):
        for chat in (MARKED, ALTERNATING) if messages[0]["role"] == "user" else (MARKED,):
            config = chatting(chat)
            whole, cut = render_chat(config.chat, messages), extract_text(config, messages)[0]
            side = CHARS_PER_TOKEN * config.max_tokens
            assert len(cut) < 1500 < len(whole)
            assert (cut[:side], cut[-side:]) == (whole[:side], whole[-side:])
            assert prepare(tokenizer, config, cut).ids == prepare(tokenizer, config, whole).ids
            assert prepare(tokenizer, config, cut).truncated


def test_four_megabytes_of_chat_cost_little() -> None:
    config = chatting(MARKED, 512)
    text = {"role": "user", "content": "what is the sum " * 250_000}
    for messages in ([text], [text] * 400, [{"role": "user", "content": "x"}] * 400_000, [{}] * 400_000):
        started = time.perf_counter()
        prompt, _ = extract_text(config, messages)
        assert time.perf_counter() - started < 0.5
        assert len(prompt) < 200_000
