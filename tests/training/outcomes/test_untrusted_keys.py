"""Which keys are untrusted."""

from dataclasses import replace

import numpy as np

from depo_gateway.training.outcomes.traffic_examples import Claim
from depo_gateway.training.outcomes.untrusted_keys import untrusted_keys


def drawn_claims(key: str, count: int, honest: bool, generator: np.random.Generator, p: np.ndarray) -> list[Claim]:
    rows = generator.integers(0, len(p), count)
    truth = generator.uniform(size=count) < p[rows, 0]
    return [Claim(int(row), key, 0, float(t == honest)) for row, t in zip(rows, truth, strict=True)]


def test_a_key_that_always_lies_stands_out_and_a_stricter_one_does_not() -> None:
    generator = np.random.default_rng(0)
    p = np.clip(generator.normal(0.75, 0.15, (2000, 1)), 0.05, 0.97)
    honest = [one for name in "abcdef" for one in drawn_claims(name, 250, True, generator, p)]
    found, remark = untrusted_keys([*honest, *drawn_claims("liar", 80, False, generator, p)], p, 4.0)
    assert (list(found), remark) == (["liar"], "")
    assert untrusted_keys(honest, p, 4.0) == ({}, "")
    strict = [
        replace(one, quality=one.quality * float(generator.uniform() < 0.85))
        for one in drawn_claims("strict", 80, True, generator, p)
    ]
    assert untrusted_keys([*honest, *strict], p, 4.0) == ({}, "")
    assert untrusted_keys(drawn_claims("liar", 80, False, generator, p), p, 4.0) == (
        {},
        "",
    )  # no other key to compare with


def test_if_many_seem_to_lie_no_key_is_left_out() -> None:
    generator = np.random.default_rng(0)
    p = np.full((500, 1), 0.9)
    found, remark = untrusted_keys(
        [*drawn_claims("a", 200, True, generator, p), *drawn_claims("b", 150, False, generator, p)], p, 4.0
    )
    assert not found
    assert remark == "the labels of 'b' contradict the others', but are 43% of all: no key is left out"
