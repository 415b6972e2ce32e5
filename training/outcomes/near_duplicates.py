"""Near-duplicate clustering of prompts: alike but for numbers, case, spacing and a few words. Pure; MinHash with bands.

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
END_CHARS = 2000  # characters read at each end of a long prompt
WORD = re.compile(r"\d+|[^\W\d]+")
PRIME = np.uint64(4_294_967_291)  # the largest below 2 ** 32, so that products stay below 2 ** 64


def near_duplicate_clusters(texts: Sequence[str], threshold: float) -> NDArray[np.int64]:
    """A cluster number for each text (N,). `threshold`: the least Jaccard similarity of near-duplicates, 0 to 1.

    A text is compared with the first text of each band that it falls into, so a cluster gathers around its first text
    and does not chain far.
    """
    generator = np.random.default_rng(0)
    factor, shift = generator.integers(1, int(PRIME), (2, BANDS * ROWS, 1), dtype=np.uint64)
    first: dict[tuple[int, bytes], int] = {}
    shingles_of_text: list[frozenset[int]] = []
    cluster = np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        shingles = shingles_of(text)
        shingles_of_text.append(shingles)
        cluster[number] = number
        hashes = np.fromiter(shingles, np.uint64, len(shingles))
        minima = ((hashes * factor + shift) % PRIME).min(1).reshape(BANDS, ROWS)
        bands = [(band, minima[band].tobytes()) for band in range(BANDS)]
        for band in bands:
            other = first.get(band)
            if other is not None and jaccard(shingles, shingles_of_text[other]) >= threshold:
                cluster[number] = cluster[other]
                break
        for band in bands:
            first.setdefault(band, number)
    return cluster


def shingles_of(text: str) -> frozenset[int]:
    """Hashes of words and of neighbouring pairs. All numbers are alike, but a text of numbers alone is one shingle."""
    ends = text if len(text) <= 2 * END_CHARS else f"{text[:END_CHARS]} {text[-END_CHARS:]}"
    words = ["0" if word[0].isdigit() else word for word in WORD.findall(ends.lower())]
    if set(words) == {"0"}:
        words = []
    pairs = [f"{one} {next_}" for one, next_ in itertools.pairwise(words)]
    return frozenset(zlib.crc32(part.encode("utf-8", "replace")) for part in [*words, *pairs] or [ends])


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard similarity, 0 to 1."""
    return len(one & other) / len(one | other)
