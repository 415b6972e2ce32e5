"""The file of `depo-train collect --save-completions`: every completion with its label, to check the labels by eye."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from depo_gateway.training.outcomes.completions import Completion, ModelLabel
from depo_gateway.training.outcomes.prompts import Prompt

Save = Callable[[Prompt, Mapping[str, Sequence[Completion]], Mapping[str, ModelLabel]], None]


def check_free(path: Path, others: Mapping[str, Path]) -> None:
    """Raises ValueError where the path is another file of the command, or can't be written."""
    for flag, other in others.items():
        if path.resolve() == other.resolve():
            raise ValueError(f"--save-completions {path} is the file of {flag}; give it a file of its own")
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"--save-completions {path}: {error.strerror}") from None


@contextmanager
def saved_completions(path: Path | None) -> Iterator[Save | None]:
    """Appends one line a completion: the prompt, model, text, reference, outcome and score (null: no label).

    None for no path. A prompt whose row was lost in a crash is asked again and stands here twice.
    """
    if path is None:
        yield None
        return
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:

        def save(
            prompt: Prompt, completions: Mapping[str, Sequence[Completion]], labels: Mapping[str, ModelLabel]
        ) -> None:
            for model, label in labels.items():
                for each, outcome, score in zip(completions[model], label.outcomes, label.scores, strict=True):
                    line = {
                        **prompt.row,
                        "answer": prompt.reference,
                        "model": model,
                        "completion": each.text,
                        "outcome": outcome,
                        "score": score,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        yield save
