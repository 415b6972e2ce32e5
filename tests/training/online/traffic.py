"""Records and labels in a real store, from which a tiny estimator can learn."""

import random
import time

from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label
from tests.conftest import WORDS
from tests.training.fake_vllm import record

LEARN = {"min_labels": 60, "folds": 2, "gate": {"least": 20, "resamples": 100}}


def prompts(count: int, seed: int) -> list[str]:
    """Different prompts, every other with the word hard."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        words = chance.sample(WORDS[2:], 7)
        words.insert(chance.randrange(8), "hard" if index % 2 else "easy")
        found.append(" ".join(words))
    return found


def fill(store: Store, count: int, seed: int, labelled: bool = True) -> None:
    """Records, and what both pools are worth on them: here the hard prompts are the small pool's."""
    begun = time.time()
    texts = prompts(count, seed)
    store.append(
        [
            record(
                seed * 10_000 + index, begun + index / 1000, asked=text, reference="right", answer=right("small", text)
            )
            for index, text in enumerate(texts)
        ]
    )
    if labelled:
        by_id = {item.record.id: item.record for item in store.logged(10_000)}
        made = [
            Label(
                by_id[f"id-{seed * 10_000 + index}"].seq,
                pool,
                "exact",
                float(right(pool, text) == "right"),
                None,
                begun,
            )
            for index, text in enumerate(texts)
            for pool in ("small", "large")
        ]
        store.add_labels(made)


def right(pool: str, text: str) -> str:
    return "right" if ("hard" in text) == (pool == "small") else "wrong"
