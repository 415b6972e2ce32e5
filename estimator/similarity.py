"""How similar a prompt is to the prompts that an estimator was fitted on: features of its deep part, and its distance.

Near neighbours carry what linear heads can't: a kind of question on which one pool fails. Instead of a table of all
fitted prompts the model holds centres, the means of clusters of them (spherical k-means), and gives a linear weight to
each: a radial basis function network on a frozen encoder.

A prompt's distance is that to the nearest centre, in units of the mean distance of this centre's own prompts: the local
outlier factor (Breunig et al., 2000), with centres for neighbours. Far from all of them nothing that was learned
applies. The unit is needed because an encoder puts some kinds of text, such as code and languages that it can't read,
close together: by distance alone, prompts of another kind look familiar there.

States are the means over tokens of the encoder's hidden states, standardised: one common direction dominates raw ones.

Shapes: B prompts, N fitted prompts, D encoder width, C centres, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from depo_gateway.estimator.encoder import int8_of

WIDTH = 0.2  # of a feature, in cosine: it has fallen to 1 / e at a cosine of 0.8
STEPS = 12  # of k-means
CHUNK = 2048  # prompts at a time: their similarities to all centres are in memory
LEAST_RADIUS = 0.02  # in cosine: of equal prompts, which have none
MOST_CENTRES, MOST_WITH_TRAFFIC = 1000, 2000  # of a fit; and after refreshes, which add their own
PROMPTS_PER_CENTRE = 3
# Fewer prompts teach the weights of centres nothing but noise, so they have centres for their distances alone
FEWEST_PROMPTS = 1000


class Similarity(nn.Module):
    """C centres and the outputs' weights of the similarity to each. It is of no use before `place`."""

    mean: Tensor
    scale: Tensor
    centres: Tensor
    centres_scale: Tensor
    unit: Tensor
    radius: Tensor

    def __init__(self, count: int, width: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        # int8 with a scale per row: a fraction of the size, and the features are fitted on what is stored
        self.register_buffer("centres", torch.zeros(count, width, dtype=torch.int8))
        self.register_buffer("centres_scale", torch.zeros(count, 1))
        self.register_buffer("unit", torch.ones(()))  # gives the features a mean square length of 1; 0: there are none
        self.register_buffer("radius", torch.ones(count))  # mean distance, 1 - cosine, of each centre's own prompts
        self.weight = nn.Parameter(torch.zeros(count, outputs))

    def place(self, states_ND: Tensor, seed: int = 0) -> None:
        """Sets scales and centres from fitted prompts, before any weight. With few prompts the features are 0."""
        self.mean.copy_(states_ND.mean(0))
        deviation = states_ND.std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-3, 1.0 / deviation.clamp_min(1e-3), 0.0))
        directions_ND = self.directions(states_ND)
        rows, scale = int8_of(spherical_centres(directions_ND, len(self.centres), seed))
        self.centres.copy_(rows.to(torch.int8))
        self.centres_scale.copy_(scale)
        self.unit.fill_(1.0)
        squared, nearest, own = 0.0, [], []
        for cosines_BC in map(self.cosines, torch.split(states_ND, CHUNK)):
            squared += float(self.features(cosines_BC).detach().pow(2).sum())
            best = cosines_BC.max(1)
            nearest.append(1.0 - best.values)
            own.append(best.indices)
        self.radius.copy_(_means(torch.cat(nearest), torch.cat(own), len(self.centres)).clamp_min(LEAST_RADIUS))
        self.unit.fill_((squared / len(states_ND)) ** -0.5 if len(states_ND) >= FEWEST_PROMPTS else 0.0)

    def fill(self, states_ND: Tensor, count: int, seed: int = 0) -> None:
        """Makes the last `count` centres those of further prompts, with weights of 0; scales and features stay."""
        directions_ND = self.directions(states_ND)
        rows, scale = int8_of(spherical_centres(directions_ND, count, seed))
        with torch.no_grad():
            self.centres[-count:] = rows.to(torch.int8)
            self.centres_scale[-count:] = scale
            self.weight[-count:] = 0.0
            cosines = [part @ (rows * scale).T for part in torch.split(directions_ND, CHUNK)]
            nearest = torch.cat([1.0 - of.amax(1) for of in cosines])
            own = torch.cat([of.argmax(1) for of in cosines])
            self.radius[-count:] = _means(nearest, own, count).clamp_min(LEAST_RADIUS)

    def empty(self, count: int) -> None:
        """Takes the last `count` centres out, until `fill`: every prompt is far from them."""
        with torch.no_grad():
            self.centres[-count:] = 0
            self.radius[-count:] = LEAST_RADIUS
            self.weight[-count:] = 0.0

    def directions(self, states_BD: Tensor) -> Tensor:
        """Standardised states of unit length (B, D)."""
        return normalize((states_BD - self.mean) * self.scale, dim=1)

    def cosines(self, states_BD: Tensor) -> Tensor:
        """Similarity to each centre (B, C), from -1 to 1."""
        return self.directions(states_BD) @ (self.centres.float() * self.centres_scale).T

    def distances(self, cosines_BC: Tensor) -> Tensor:
        """To the nearest centre (B,): 1 is as far as its own prompts are on average."""
        nearest = cosines_BC.max(1)
        return (1.0 - nearest.values) / self.radius[nearest.indices]

    def features(self, cosines_BC: Tensor) -> Tensor:
        """Radial basis functions of the similarities (B, C)."""
        return torch.exp((cosines_BC - 1.0) / WIDTH) * self.unit

    def forward(self, cosines_BC: Tensor) -> Tensor:
        """Their part of the logits (B, O)."""
        logits: Tensor = self.features(cosines_BC) @ self.weight
        return logits


def usual_centres(prompts: int) -> int:
    """The number of centres for a fit on so many distinct prompts."""
    return min(MOST_CENTRES, prompts // PROMPTS_PER_CENTRE)


def spherical_centres(directions_ND: Tensor, count: int, seed: int) -> Tensor:
    """Means (count, D) of unit length of clusters by cosine, from random prompts on. Fewer prompts than that recur."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(directions_ND), generator=generator)
    chosen = order[torch.arange(count) % len(order)]
    centres_CD = directions_ND[chosen.to(directions_ND.device)]
    for _ in range(STEPS):
        nearest_N = torch.cat([(chunk @ centres_CD.T).argmax(1) for chunk in torch.split(directions_ND, CHUNK)])
        sums_CD = torch.zeros_like(centres_CD).index_add_(0, nearest_N, directions_ND)
        empty = sums_CD.norm(dim=1, keepdim=True) < 1e-6
        centres_CD = torch.where(empty, centres_CD, normalize(sums_CD, dim=1))
    return centres_CD


def _means(values_N: Tensor, own_N: Tensor, count: int) -> Tensor:
    """The mean of each cluster's values (count,); the mean of all for a cluster of less than two."""
    sums = torch.zeros(count, device=values_N.device).index_add_(0, own_N, values_N)
    sizes = torch.bincount(own_N, minlength=count)
    return torch.where(sizes > 1, sums / sizes.clamp_min(1), values_N.mean())


def held_out_distances(states_ND: Tensor, count: int, seed: int = 0) -> Tensor:
    """Distances (N,) of fitted prompts from `count` centres, as new prompts of their kind would have them.

    Each half of the prompts is measured from the centres of the other half; those are half as many.
    """
    order = torch.randperm(len(states_ND), generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split(2)
    distances_N = torch.zeros(len(states_ND))
    for rows, others in (halves, halves[::-1]):
        other = Similarity(max(1, count // 2), states_ND.shape[1], 0)
        other.place(states_ND[others], seed)
        for part in torch.split(rows, CHUNK):
            distances_N[part] = other.distances(other.cosines(states_ND[part]))
    return distances_N
