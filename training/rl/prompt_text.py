"""The prompts of a data set as the estimator reads them: the same text that the gateway makes of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, overload

from depo_gateway.estimator.text import CHAT, TextConfig, extract_text, with_special_tokens


def text_config(tokenizer: Any, chat_options: Mapping[str, Any] | None, max_tokens: int) -> TextConfig:
    """How prompts become text: by the policy's chat template with the variables `chat_options`, or as they are."""
    chat = tokenizer.chat_template
    if not isinstance(chat, str) or not chat:
        return TextConfig(pooling="cls", max_tokens=max_tokens)
    plain = {name: value for name, value in (chat_options or {}).items() if isinstance(value, str | bool | int | float)}
    settings = "".join(f"{{% set {name} = {json.dumps(value)} %}}\n" for name, value in plain.items())
    chat = with_special_tokens(settings + chat, tokenizer.special_tokens_map)
    return TextConfig(CHAT, "cls", max_tokens, chat)


class Prompts(Sequence[str]):
    """The column `prompt`, read on access: a large data set's texts would fill the memory of every process."""

    def __init__(self, rows: Any, text: TextConfig) -> None:
        self.column, self.text = rows["prompt"], text

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        text, _ = extract_text(self.text, self.column[row])  # with a chat template the context is empty
        return text
