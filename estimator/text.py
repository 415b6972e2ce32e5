"""How text becomes input, for fitting and serving alike. No torch.

A prompt is cut by characters before it is tokenised, so 4 MB cost no more than a screenful; then its tokens are cut to
head and tail. Shapes: T tokens, S surface features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

TEMPLATE = "[CLS] {prompt} [SEP] {context} [SEP]"  # the only one so far; without context the last two are left out
POOLINGS = ("mean", "cls")
CHARS_PER_TOKEN = 8  # kept on each side: prose has 4 to 5, so the seam is far from any token kept
CONTEXT_MESSAGES = 8  # older turns can't fit beside a prompt


@dataclass(frozen=True, slots=True)
class TextConfig:
    """How a checkpoint reads text; stands in its manifest."""

    template: str = TEMPLATE
    pooling: str = "cls"
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if self.template != TEMPLATE:
            raise ValueError(f"text template {self.template!r} is unknown; this version knows {TEMPLATE!r}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        if not 8 <= self.max_tokens <= 8192:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must lie between 8 and 8192")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt ready to be scored: ids of T <= max_tokens tokens with specials, and S surface features."""

    ids: tuple[int, ...]
    truncated: bool
    surface: tuple[float, ...]


def text_of_content(content: object) -> str:
    """The text of a chat message's content: a string, or an array of parts of which only the text ones count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(part for part in parts if isinstance(part, str))


def prompt_of_messages(messages: Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """(the last user turn, the user and assistant text before it, newest last).

    System, developer and tool text is left out: it is the same for every query of an application, and a long tool
    result says nothing of how hard the user's question is.
    """
    turns = [
        (message.get("role"), text)
        for message in messages
        if isinstance(message, Mapping) and message.get("role") in ("user", "assistant")
        for text in (text_of_content(message.get("content")),)
        if text
    ]
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    if last is None:
        return "", ""
    return turns[last][1], "\n".join(text for _, text in turns[max(0, last - CONTEXT_MESSAGES) : last])


def load_tokenizer(serialized: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; its own padding and truncation go: prepare() cuts.

    "[SEP]" in a prompt is read as those five characters: only prepare() sets special tokens.
    """
    if "model" not in json.loads(serialized):  # tokenizers itself would raise a bare Exception
        raise ValueError("its tokenizer.json is no tokenizer")
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def clean(text: str) -> str:
    """The text with "?" for lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def prepare(tokenizer: Tokenizer, config: TextConfig, text: str, context: str = "") -> Prepared:
    """Text -> ids and surface features, by the manifest's template. Cost is bounded by max_tokens, not by len(text).

    The prompt comes first; context fills what room is left, its newest tokens kept. `truncated` speaks of the prompt
    alone.
    """
    room = config.max_tokens - 2
    side = CHARS_PER_TOKEN * config.max_tokens
    kept = clean(text if len(text) <= 2 * side else f"{text[:side]} {text[-side:]}")
    first, *_, last = tokenizer.encode("").ids  # [CLS] and [SEP], whatever this tokenizer calls them
    ids = tokenizer.encode(kept, add_special_tokens=False).ids
    truncated = len(ids) > room or len(kept) < len(text)
    if len(ids) > room:
        ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
    prepared = [first, *ids, last]
    room = config.max_tokens - len(prepared) - 1
    if context and room > 0:
        earlier = tokenizer.encode(clean(context[-side:]), add_special_tokens=False).ids
        prepared += [*earlier[-room:], last]
    return Prepared(tuple(prepared), truncated, surface_features(kept, len(text)))


SURFACE = (
    "chars", "words", "digits", "digit_share", "lines", "options", "answer_cue", "backslashes", "dollars",
    "operators", "code_signs", "questions", "commas", "upper_share", "other_scripts", "chars_per_word", "fences",
    "negations",
)  # fmt: skip
OPTION = re.compile(r"(?m)^[ \t]*\(?[A-J1-9][.):] ")
ANSWER_CUE = re.compile(r"(?i)\banswer\s*:|\boptions\s*:|\bchoices\s*:")
NEGATION = re.compile(r"(?i)\b(?:not|except|never|least|cannot|false|incorrect)\b")


def _classes() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Class of each Latin-1 character, for one bincount instead of a scan a feature."""
    table = np.zeros(256, np.uint8)
    for number, characters in enumerate(("0123456789", "\n", "\\", "$", "+-*/=^<>%", "{}[]();_#", "?", ",", " \t"), 1):
        table[[ord(c) for c in characters]] = number
    table[[ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = 10
    table[128:] = 11
    return table


CLASSES = _classes()


def surface_features(text: str, length: int | None = None) -> tuple[float, ...]:
    """What a glance tells, in the order of SURFACE, not yet standardised. `length` in characters, if text was cut."""
    total = len(text) if length is None else length
    # a character outside Latin-1 becomes byte 255 and counts as another script
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    count = np.bincount(CLASSES[np.minimum(codes, 255)], minlength=12).tolist()
    chars, words = max(len(text), 1), count[9] + count[2] + 1
    return (
        math.log1p(total),
        math.log1p(words * total / chars),
        math.log1p(count[1]),
        count[1] / chars,
        math.log1p(count[2]),
        float(min(len(OPTION.findall(text)), 6)),
        float(ANSWER_CUE.search(text) is not None),
        math.log1p(count[3]),
        math.log1p(count[4]),
        math.log1p(count[5]),
        math.log1p(count[6]),
        math.log1p(count[7]),
        math.log1p(count[8]),
        count[10] / chars,
        count[11] / chars,
        min(chars / words, 30.0),
        float("```" in text),
        math.log1p(len(NEGATION.findall(text))),
    )
