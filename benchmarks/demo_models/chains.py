"""The demo's two language models: a task, a tokenizer, and their supervised fine-tuning.

`python -m benchmarks.demo_models.chains --out DIR` writes them.

The task is chain arithmetic: `3+4*9-2=` is evaluated left to right modulo 10, and the answer restates every step,
`3+4=7;7*9=3;3-2=1` (without the restated operands, models with ordinary positions do not learn it). The last digit is
graded.

Prompts are split into three disjoint sets by a hash of their text: `sft` for the two models, `collect` for the
estimator, `evaluate` for neither. The split does not depend on a seed.

Both models are trained from scratch in minutes on two cores. They differ as small and large models do in practice: in
size and in training data. The small one is trained on few multiplications (see RECIPES), so that length is not its only
difficulty: at equal length it fails on chains with `*`, where the large one is still right.

Legend of shapes: B batch, T tokens.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.demo_models.gguf import write_gguf
from depo_gateway.training.rewards.verifiers import Grader

OPERATORS = "+-*"
TRAFFIC = (5.0, 3.0, 2.0)  # the operators' weights in evaluation prompts
LENGTHS = tuple(range(1, 9))
SPLITS = {"sft": range(0, 8), "collect": range(8, 12), "evaluate": range(12, 16)}  # sixteenths of all prompts
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A conversation is the text that the models were trained on, turn by turn. The template reads system and tool turns but
# omits them: llama.cpp merges a system turn into the user's if a template does not access its content.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = message['content'] or '' %}"
    "{% if message['role'] == 'user' %}{{ bos_token + text }}"
    "{% elif message['role'] == 'assistant' %}{{ text + eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The training recipe of one of the two models."""

    name: str
    hidden: int
    layers: int
    steps: int
    learning_rate: float
    operators: tuple[float, float, float]  # weights of + - * in its training data
    chats: tuple[float, int]  # (start, n): from this fraction of training on, every nth batch has two-turn chats


RECIPES = (
    Recipe("small", 64, 2, 4500, 3e-3, (8.0, 4.0, 0.15), (0.8, 4)),  # with chats from the start it did not learn
    Recipe("large", 192, 4, 700, 1.5e-3, TRAFFIC, (0.0, 8)),
)


def answer_of(prompt: str) -> str:
    """`3+4*9-2=` -> `3+4=7;7*9=3;3-2=1`. The last character is the result."""
    running = int(prompt[0])
    steps = []
    for operator, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        operand = int(digit)
        exact = {"+": running + operand, "-": running - operand, "*": running * operand}[operator]
        steps.append(f"{running}{operator}{operand}={exact % 10}")
        running = exact % 10
    return ";".join(steps)


def split_of(prompt: str) -> str:
    """The one set that this prompt belongs to: sft, collect or evaluate."""
    slot = hashlib.sha256(prompt.encode()).digest()[0] % 16
    return next(name for name, slots in SPLITS.items() if slot in slots)


def draw(rng: random.Random, split: str, operators: Sequence[float]) -> str:
    """A random prompt of a split. Every chain has its own mixture of operators, `operators` on average."""
    while True:
        length = rng.choices(LENGTHS)[0]
        mixture = [rng.gammavariate(weight / sum(operators) * 2, 1) + 1e-9 for weight in operators]
        links = (rng.choices(OPERATORS, mixture)[0] + str(rng.randrange(10)) for _ in range(length))
        prompt = f"{rng.randrange(10)}{''.join(links)}="
        if split_of(prompt) == split:
            return prompt


def chains(split: str, count: int, seed: int) -> list[str]:
    """`count` different prompts of a split with TRAFFIC's operators; lengths are equally frequent where possible."""
    rng = random.Random(f"{split} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng, split, TRAFFIC)] = None
    return list(found)


def row_of(prompt: str) -> dict[str, str]:
    """A line of a prompts file, as `depo-train collect` and the demo read it."""
    return {"question": prompt, "answer": answer_of(prompt)[-1], "source": "chains"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer, so that it encodes any text and any JSON grammar; ids are equal in HF, vLLM and llama.cpp.

    Its one merge (two spaces) exists because llama.cpp refuses a BPE vocabulary without merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet, "ĠĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ")]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's size, heads of 32 (the smallest that vLLM's CPU attention takes)."""
    heads = recipe.hidden // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def training_batch(
    rng: random.Random, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, size: int, turns: int
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, each [B, T]; only answers and their ends are labelled. `turns` 2: a chat."""
    rows: list[list[tuple[int, int]]] = []
    for _ in range(size):
        row: list[tuple[int, int]] = []
        for _ in range(turns):
            prompt = draw(rng, "sft", recipe.operators)
            row += [(token, -100) for token in tokenizer.encode(prompt)]
            row += [(token, token) for token in tokenizer.encode(answer_of(prompt) + EOS, add_special_tokens=False)]
        rows.append(row)
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id
    padded_BT = torch.tensor([row + [(pad, -100)] * (longest - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": padded_BT[..., 0], "attention_mask": mask_BT, "labels": padded_BT[..., 1]}


def fine_tune(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, batch: int = 64) -> LlamaForCausalLM:
    """Supervised fine-tuning from scratch: AdamW, one cycle of the learning rate."""
    torch.manual_seed(seed)
    rng = random.Random(f"{recipe.name} {seed}")
    model = build_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    chats_from, chat_every = recipe.chats
    bar = tqdm(range(recipe.steps), desc=f"{recipe.name}: SFT", disable=not sys.stderr.isatty())
    for step in bar:
        two_turns = step >= chats_from * recipe.steps and step % chat_every == chat_every - 1
        loss = model(**training_batch(rng, recipe, tokenizer, batch // 2 if two_turns else batch, 1 + two_turns)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return model


@torch.no_grad()
def passes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[float]:
    """Whether one completion sampled at temperature 1 ends in the right digit, for prompts of one length."""
    inputs = tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
    output_BT = model.generate(  # type: ignore[misc]  # transformers' own annotation does not accept a Llama
        **inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    completions = tokenizer.batch_decode(output_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = [(text, answer_of(prompt)[-1]) for prompt, text in zip(prompts, completions, strict=True)]
    return [reward or 0.0 for reward in Grader("number").grade(pairs)]


def report(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> str:
    """A Markdown table: pass@1 on `count` evaluation chains, one sampled answer each."""
    prompts = chains("evaluate", count, seed)
    alike = {length: [prompt for prompt in prompts if length_of(prompt) == length] for length in LENGTHS}
    graded: dict[str, float] = {}
    for group in filter(None, alike.values()):
        graded.update(zip(group, passes(model, tokenizer, group), strict=True))
    size = f"{model.num_parameters() / 1e6:.2f}M parameters"
    return f"{name}, {size}: pass@1 {_mean(graded.values())} on {len(prompts)} evaluation chains\n\n{by_kind(graded)}"


def by_kind(graded: Mapping[str, float]) -> str:
    """A Markdown table of mean pass rates by a chain's length and number of multiplications."""
    lines = ["| length | chains | all | no `*` | 1 | 2 | 3 and more |", "|---|---|---|---|---|---|---|"]
    for length in LENGTHS:
        group = [prompt for prompt in graded if length_of(prompt) == length]
        cells = [[graded[p] for p in group if min(3, p.count("*")) == products] for products in range(4)]
        means = " | ".join(map(_mean, [[graded[p] for p in group], *cells]))
        lines.append(f"| {length} | {len(group)} | {means} |")
    return "\n".join(lines)


def length_of(prompt: str) -> int:
    """The number of steps of a chain."""
    return (len(prompt) - 2) // 2


def _mean(values: Collection[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "-"


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face directory in bfloat16 (what vLLM serves) and model.gguf beside it (what llama.cpp serves)."""
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Every reader supports tokenizer_config.json; vLLM and older transformers look for the template only there.
    template = folder / "chat_template.jinja"
    settings_path = folder / "tokenizer_config.json"
    settings = {**json.loads(settings_path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    if template.exists():
        settings["chat_template"] = template.read_text()
        template.unlink()
    settings_path.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    write_gguf(folder, folder / "model.gguf")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_models.chains", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="directory that receives small/, large/, queries.jsonl")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="make only one of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of training, fewer for a trial (default: the recipes')")
    parser.add_argument("--evaluate", type=int, default=1600, help="evaluation chains (default 1600)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    for recipe in RECIPES:
        if options.only not in (None, recipe.name):
            continue
        model = fine_tune(replace(recipe, steps=options.steps or recipe.steps), tokenizer, options.seed)
        save(model, tokenizer, options.out / recipe.name)
        print(report(recipe.name, model.float(), tokenizer, options.evaluate, options.seed), flush=True)
    queries = options.out / "queries.jsonl"
    queries.write_text("".join(json.dumps(row_of(prompt)) + "\n" for prompt in chains("evaluate", 500, options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
