"""Which prompts are near-same: alike but for numbers, case, spacing and a few words. Pure; MinHash, no pairs compared.

Shapes: N prompts, S shingles of one prompt (its words and neighbouring pairs of words), M = BANDS * ROWS hashes.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BANDS, ROWS = 8, 4  # prompts that share .8 of their shingles meet in a band with probability .985, .5: .40
SIDE = 2000  # characters read at each end
WORD = re.compile(r"\d+|[^\W\d]+")
PRIME = np.uint64(4_294_967_291)  # the largest below 2 ** 32, so that products stay below 2 ** 64


def clusters(texts: Sequence[str], near: float) -> NDArray[np.int64]:
    """A number for each text (N,): near-same ones have the same. `near`: the share of shingles in common, 0 to 1.

    A text is compared with the first of those that it shares a band with, so a cluster is what surrounds its first text
    and chains stay short.
    """
    generator = np.random.default_rng(0)
    factor, shift = generator.integers(1, int(PRIME), (2, BANDS * ROWS, 1), dtype=np.uint64)
    first: dict[tuple[int, bytes], int] = {}
    known: list[frozenset[int]] = []
    found = np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        shingles = shingles_of(text)
        known.append(shingles)
        found[number] = number
        hashed = np.fromiter(shingles, np.uint64, len(shingles))
        least = ((hashed * factor + shift) % PRIME).min(1).reshape(BANDS, ROWS)
        bands = [(band, least[band].tobytes()) for band in range(BANDS)]
        for band in bands:
            other = first.get(band)
            if other is not None and alike(shingles, known[other]) >= near:
                found[number] = found[other]
                break
        for band in bands:
            first.setdefault(band, number)
    return found


def shingles_of(text: str) -> frozenset[int]:
    """Hashes of words and of neighbouring pairs; a number is any number. Arithmetic, without words, is itself."""
    ends = text if len(text) <= 2 * SIDE else f"{text[:SIDE]} {text[-SIDE:]}"
    words = ["0" if word[0].isdigit() else word for word in WORD.findall(ends.lower())]
    if set(words) == {"0"}:
        words = []
    pairs = [f"{one} {next_}" for one, next_ in itertools.pairwise(words)]
    return frozenset(zlib.crc32(part.encode("utf-8", "replace")) for part in [*words, *pairs] or [ends])


def alike(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard similarity, 0 to 1."""
    return len(one & other) / len(one | other)
