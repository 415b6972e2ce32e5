"""`depo-train refresh`: continues training from served traffic, and publishes only what is shown to do no harm.

    select     labelled records -> examples, folds, initialisations                (training_set.py)
    weigh      importance weights, if traffic has changed                          (training_set.py)
    cross_fit  held-out predictions of each initialisation, the better one chosen  (initialisation_choice.py)
               and all three again without the claims of untrusted keys
    calibrate  the final model, calibrated on the newest held-out predictions      (holdout.py)
    judge      the publish gate compares it with the champion                      (holdout.py, publish_gate.py)
    publish    it is written and published, held back, or refused with the reasons (publication.py)

Each stage takes and returns RefreshData (refresh_data.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.online.champion import starting_point
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.holdout import calibrate_candidate, judge_candidate
from depo_gateway.training.online.initialisation_choice import cross_fit_examples, exclude_untrusted_keys
from depo_gateway.training.online.publication import OwnerTerms, RefreshResult, publish_candidate, refuse_candidate
from depo_gateway.training.online.publish_gate import Verdict
from depo_gateway.training.online.refresh_config import NO_TEXT, RefreshConfig
from depo_gateway.training.online.refresh_data import NothingToLearnError, RefreshInputs
from depo_gateway.training.online.training_set import select_examples, weigh_examples
from depo_gateway.training.outcomes.table import Row


def refresh(
    labelled: Sequence[Labelled],
    base: Path,
    out: Path,
    config: RefreshConfig,
    reference: Sequence[Row] = (),
    cache: EmbeddingCache | None = None,
    cold: bool = False,
    terms: OwnerTerms | None = None,
) -> RefreshResult:
    """Learns from labelled records, and publishes a new checkpoint into `out` or refuses.

    The champion is what `out/current` names, else `base`. Publishing writes a checkpoint `refresh-...`, `current` and
    standing.json; holding one back writes the checkpoint, held.json and a line of refusals.jsonl; refusing appends that
    line alone.

    Args:
        base: a checkpoint, a directory with `current`, or "builtin", whose two pools take the traffic's names in order.
        reference: rows of an outcome table, by pool name, on which no candidate may route worse.
        cold: without `out/current` there is no champion: fresh heads on the base's encoder, whatever its pools.
        terms: live traffic, and what the owner allows a publish to change; None: nothing is known of live traffic.

    Raises:
        ValueError: records without text, or of other pools than the champion's; a directory that can't be written.
    """
    checkpoint.ensure_free(out / f"refresh-{secrets.token_hex(4)}")
    if labelled and all(item.record.asked is None for item in labelled):
        raise ValueError(NO_TEXT)
    labelled = sorted(labelled, key=lambda item: (item.record.time, item.record.seq))[-config.newest :]
    start = starting_point(base, out, cold, labelled)
    inputs = RefreshInputs(labelled, start, config, reference, EmbeddingCache() if cache is None else cache)
    with one_thread():
        try:
            data = select_examples(inputs)
            data = weigh_examples(data)
            data = cross_fit_examples(data)
            data = exclude_untrusted_keys(data)
            data = calibrate_candidate(data)
            data = judge_candidate(data)
        except NothingToLearnError as error:
            return refuse_candidate(out, start, Verdict(False, (error.reason,), {}), 0, None, error.notes)
        return publish_candidate(data, out, OwnerTerms() if terms is None else terms)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: steps on known embeddings are so small that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
