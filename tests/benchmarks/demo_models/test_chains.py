import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo_models import chains
from benchmarks.demo_models.chains import (
    RECIPES,
    SPLITS,
    answer_of,
    build_model,
    build_tokenizer,
    row_of,
    split_of,
)
from depo_gateway import gateway
from depo_gateway.training.rewards.number import grade_number

SHIPPED = Path(gateway.__file__).parent / "demo" / "data"
ODD_TEXTS = [
    "3+4=",
    "  two  spaces   ",
    "Grüße, 世界! 🎉",
    "a\tb\n\nc",
    "</s> <s>",
    "it's 12345 x",
    "\x00\x7f",
    '{"a": [1]}',
]

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "3+4="}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "3+4="},
        {"role": "assistant", "content": "3+4=7"},
        {"role": "user", "content": "5*5="},
    ],
    [
        {"role": "user", "content": "3+4="},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "7"},
    ],
]


def test_an_answer_restates_every_step_modulo_ten() -> None:
    assert answer_of("3+4*9-2=") == "3+4=7;7*9=3;3-2=1"
    assert answer_of("2-5=") == "2-5=7"
    for prompt in chains.chains("evaluate", 200, seed=1):
        bracketed = "(" * (prompt.count("=") * 8) + prompt[0]
        depth = 8
        for i in range(1, len(prompt) - 1, 2):
            bracketed += prompt[i : i + 2] + ")"
            depth -= 1
        result = eval(bracketed + ")" * depth) % 10
        assert answer_of(prompt)[-1] == str(result)
        assert grade_number(answer_of(prompt), row_of(prompt)["answer"]).reward == 1


def test_the_three_sets_are_disjoint_and_reproducible() -> None:
    sets = {split: chains.chains(split, 500, seed=0) for split in SPLITS}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == 1500
    assert all(split_of(prompt) == split for split, prompts in sets.items() for prompt in prompts)
    assert sets["collect"] == chains.chains("collect", 500, seed=0) != chains.chains("collect", 500, seed=1)
    assert split_of("3+4*9-2=") == "sft"  # another hash would leak training prompts into the evaluation
    assert sorted(slot for slots in SPLITS.values() for slot in slots) == list(range(16))


def test_chains_vary_in_operators_at_equal_length() -> None:
    prompts = chains.chains("collect", 3000, seed=0)
    alike = [prompt.count("*") for prompt in prompts if len(prompt) == 12]
    assert {0, 1, 2, 3, 4} <= set(alike)
    counts = {operator: sum(prompt.count(operator) for prompt in prompts) for operator in "+-*"}
    shares = [counts[operator] / sum(counts.values()) for operator in "+-*"]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_any_text_survives_the_tokenizer_and_a_chat_is_turn_after_turn() -> None:
    tokenizer = build_tokenizer()
    for text in ODD_TEXTS:
        if "<s>" not in text:
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("3+4=") == ["3", "+", "4", "="]
    assert [tokenizer.apply_chat_template(turns, tokenize=False) for turns in CHATS] == [
        "<s>3+4=",
        "<s>3+4=3+4=7</s><s>5*5=",
        "<s>3+4=</s>",
    ]


def test_only_answers_are_labelled() -> None:
    tokenizer = build_tokenizer()
    batch = chains.training_batch(random.Random(0), RECIPES[0], tokenizer, size=4, turns=2)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        labelled = tokenizer.decode(ids[labels != -100])
        first, second, _ = labelled.split("</s>")
        text = tokenizer.decode(ids)
        prompts = re.findall(r"<s>([^=]+=)", text)
        assert [first, second] == [answer_of(prompt) for prompt in prompts]
        assert all(split_of(prompt) == "sft" for prompt in prompts)


def test_the_two_sizes() -> None:
    tokenizer = build_tokenizer()
    sizes = {recipe.name: build_model(recipe, tokenizer).num_parameters() for recipe in RECIPES}
    assert 0.09e6 < sizes["small"] < 0.15e6
    assert 1.5e6 < sizes["large"] < 2.5e6


def test_the_command_makes_directories_that_transformers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chains.main(["--out", str(tmp_path), "--steps", "2", "--evaluate", "40", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+), [\d.]+M parameters: pass@1 [\d.]+ on 40 evaluation chains", printed, re.M) == [
        "small",
        "large",
    ]
    rows = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    assert all(split_of(row["question"]) == "evaluate" for row in rows)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "small").eos_token_id


def test_pass_rates_by_length_and_multiplications() -> None:
    table = chains.by_kind({"1+1=": 1.0, "1*1=": 0.5, "2*1=": 0.0, "1*1*1*1*1=": 0.25})
    assert "| 1 | 3 | 0.50 | 1.00 | 0.25 | - | - |" in table
    assert "| 4 | 1 | 0.25 | - | - | - | 0.25 |" in table
    assert "| 2 | 0 | - | - | - | - | - |" in table


# llama.cpp serves what transformers does


@pytest.fixture(scope="module", params=["random", "shipped"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LlamaForCausalLM, PreTrainedTokenizerFast]]:
    """A llama.cpp server and the same model in transformers."""
    pytest.importorskip("xllamacpp")
    if request.param == "shipped":
        folder = SHIPPED / "small"
    else:
        folder = tmp_path_factory.mktemp("random")
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        fresh = build_model(RECIPES[0], tokenizer)
        for parameter in fresh.parameters():  # far from ties and from norms of one
            parameter.data += 0.2 * torch.randn_like(parameter)
        # Half characters and control tokens stay out of the reply's list of tokens, and would shift it.
        unspeakable = [i for i in range(len(tokenizer)) if not re.fullmatch(r"[!-~]", tokenizer.decode([i]))]
        fresh.get_input_embeddings().weight.data[unspeakable] = 0
        chains.save(fresh, tokenizer, folder)
    command = [
        sys.executable,
        "-m",
        "depo_gateway.gateway.demo.llama_server",
        "--port",
        "0",
        "--model",
        str(folder / "model.gguf"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[-1]
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        yield url, model.eval(), AutoTokenizer.from_pretrained(folder)
        running.terminate()


def ask(url: str, path: str, **body: Any) -> Any:
    with urlopen(Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})) as response:
        return json.load(response)


def test_llama_cpp_tokenizes_as_hugging_face(
    served: tuple[str, LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    url, _, tokenizer = served
    for text in [*ODD_TEXTS, *chains.chains("evaluate", 300, seed=2)]:
        ids = ask(url, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert ids == tokenizer.encode(text), text


def test_llama_cpp_renders_a_chat_as_hugging_face(
    served: tuple[str, LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    url, _, tokenizer = served
    for turns in CHATS:
        rendered = ask(url, "/apply-template", messages=turns)["prompt"]
        assert "<s>" + rendered == tokenizer.apply_chat_template(turns, tokenize=False)


def test_llama_cpp_gives_the_same_greedy_tokens_and_log_probabilities(
    served: tuple[str, LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    url, model, tokenizer = served
    for prompt in [*chains.chains("evaluate", 24, seed=3), "3+4=3+4=7</s><s>5*5=", "What is 3+4?"]:
        reply = ask(url, "/v1/completions", prompt=prompt, temperature=0, max_tokens=24, logprobs=1)
        tokens = reply["choices"][0]["logprobs"]["content"]
        ids = tokenizer.encode(prompt)
        full = torch.tensor([ids + [token["id"] for token in tokens]])
        with torch.no_grad():
            logprobs_TV = model(full).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for token, row_V in zip(tokens, logprobs_TV, strict=True):
            assert token["logprob"] == pytest.approx(row_V[token["id"]].item(), abs=0.03)
            assert row_V.max().item() == pytest.approx(row_V[token["id"]].item(), abs=0.03)  # greedy, up to a tie
