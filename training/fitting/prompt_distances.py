"""Distances of fitted prompts from the others, as new prompts of their kind would have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.similarity import held_out_distances


def prompt_distances(model: Estimator, items: Sequence[Item], further: Sequence[Item] = ()) -> Array:
    """Held-out distances (N,) of fitted items, from them and from further fitted ones. The model has centres."""
    embeddings = [item.embedding for item in (*items, *further) if item.embedding is not None]
    states = torch.stack(embeddings)[:, model.width :].cpu()
    found: Array = held_out_distances(states, model.config.centres).double().numpy()[: len(items)]
    return found
