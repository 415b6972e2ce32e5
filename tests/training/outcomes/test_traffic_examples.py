"""Which labels of served traffic are used, and how much each counts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from depo_gateway.estimator.records.types import FEEDBACK, Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.outcomes.traffic_config import TrafficConfig
from depo_gateway.training.outcomes.traffic_examples import Traffic, claim_caps, examples_of_traffic

POOLS = ("small", "large")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def served(seq: int, labels: Mapping[tuple[str, str], float], asked: str | None = None, **fields: Any) -> Labelled:
    """A record, a minute after the one before, with labels by (source, pool)."""
    words = " ".join(NUMBERS[int(digit)] for digit in str(seq))
    given: dict[str, Any] = {
        "id": str(seq), "time": 60.0 * seq, "key": "a", "pool": "small", "reason": "confident", "pools": POOLS,
        "status": 200, "asked": f"what is {words}" if asked is None else asked, "seq": seq, **fields,
    }  # fmt: skip
    found = tuple(
        Label(seq, pool, source, quality, None, 0.0, 10 * seq + number)
        for number, ((source, pool), quality) in enumerate(labels.items())
    )
    return Labelled(Record(**given), found)


def read(labelled: list[Labelled], *, untrusted: tuple[str, ...] = (), **settings: Any) -> Traffic:
    return examples_of_traffic(labelled, POOLS, TextConfig(), TrafficConfig(**settings), untrusted)


def test_only_records_with_text_an_answer_and_a_quality_of_these_pools_count() -> None:
    good = served(1, {(FEEDBACK, "small"): 1.0})
    token = Labelled(good.record, (Label(1, "small", "none", None, 0.5, seq=9),))
    others = [
        replace(good, record=replace(good.record, asked=None)),
        served(2, {(FEEDBACK, "small"): 1.0}, status=502),
        served(3, {(FEEDBACK, "another"): 1.0}),
        served(4, {}),
        served(5, {(FEEDBACK, "small"): 1.0}, asked="  "),
        token,
    ]
    traffic = read([*others, good])
    assert [example.prompt for example in traffic.examples] == ["what is one"]
    assert (traffic.records, traffic.keys, traffic.times.tolist(), traffic.trained_to) == ((1,), ("a",), [60.0], 50)


def test_a_conversation_is_read_as_the_checkpoint_reads_it() -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    record = served(1, {("math", "small"): 1.0})
    asked = [{"role": "system", "content": "be nice"}, *turns, {"role": "user", "content": "why"}]
    (example,) = read([replace(record, record=replace(record.record, asked=asked))]).examples
    assert (example.prompt, example.context) == ("why", "hello\nhi")


@pytest.mark.parametrize(
    ("labels", "quality"),
    [
        ({(FEEDBACK, "small"): 0.0, ("model", "small"): 1.0, ("model", "large"): 1.0}, (1.0, 1.0)),
        ({(FEEDBACK, "small"): 0.0, ("model", "small"): 1.0}, (0.0, None)),
        ({(FEEDBACK, "small"): 0.0, ("exact", "small"): 1.0}, (1.0, None)),
        ({(FEEDBACK, "small"): 0.2, ("webhook", "large"): 0.9}, (0.2, 0.9)),
    ],
)
def test_one_source_for_all_pools_then_the_lowest_rank(
    labels: dict[tuple[str, str], float], quality: tuple[float | None, float | None]
) -> None:
    (example,) = read([served(1, labels)]).examples
    assert tuple(example.quality.get(pool) for pool in POOLS) == quality


def test_only_free_decisions_that_show_the_served_pool_alone_are_weighted_by_propensity() -> None:
    alone, both = {(FEEDBACK, "small"): 1.0}, {("model", "small"): 1.0, ("model", "large"): 1.0}
    free = {"reason": "explore", "propensity": 0.25}
    records = [
        served(1, alone, **free),
        served(2, both, **free),
        served(3, alone, reason="sticky", propensity=0.25),
        served(4, alone, reason="explore", propensity=0.01),
        served(5, {(FEEDBACK, "large"): 1.0}, **free),
        served(6, alone, **free, pools=("small",)),
    ]
    weights = [example.weight for example in read(records, clip=10.0).examples]
    assert weights == [4.0, 1.0, 1.0, 10.0, 1.0, 1.0]


def test_duplicates_share_one_weight_and_their_mean() -> None:
    records = [
        served(n, {(FEEDBACK, "small"): float(n % 2)}, asked="What is  ONE" if n > 3 else "what is one")
        for n in range(1, 6)
    ]
    traffic = read(records)
    (example,) = traffic.examples
    assert (example.weight, example.quality) == (1.0, {"small": pytest.approx(0.6)})
    assert (traffic.records, len(traffic.claims)) == ((5,), 5)
    free = {"reason": "explore", "propensity": 0.1}
    whole = [served(1, {(FEEDBACK, "small"): 1.0}, asked="x", **free)]
    whole.append(served(2, {(FEEDBACK, "large"): 0.0}, asked="x", pool="large", **free))
    (both,) = read(whole).examples
    assert (both.weight, both.quality) == (1.0, {"small": 1.0, "large": 0.0})


def test_no_key_makes_up_more_than_its_share_of_all_claims() -> None:
    records = [served(n, {(FEEDBACK, "small"): 1.0}, key="big" if n <= 90 else f"k{n % 5}") for n in range(1, 101)]
    traffic = read(records, key_share=0.2, burst=1000)
    weight = {
        key: sum(e.weight for e, k in zip(traffic.examples, traffic.keys, strict=True) if k == key)
        for key in traffic.keys
    }
    assert weight["big"] == pytest.approx(20)
    assert weight["k1"] == 2
    assert traffic.notes == (
        "labels claimed by key 'big' are down-weighted to 0.22: they made up too much of all feedback",
    )
    judged = [
        served(n, {("model", "small"): 1.0, ("model", "large"): 1.0}, key="big" if n <= 90 else "b")
        for n in range(1, 101)
    ]
    assert {example.weight for example in read(judged).examples} == {1.0}  # not the key's claims
    assert {example.weight for example in read(records[:50]).examples} == {1.0}  # one key alone


def test_a_key_that_alone_brings_a_new_topic_does_not_take_over() -> None:
    old = [served(seq, {(FEEDBACK, "small"): 1.0}, key=f"k{seq % 9}") for seq in range(1, 91)]
    new = [served(seq, {(FEEDBACK, "small"): 0.0}, key="x") for seq in range(101, 111)]
    traffic = read([*old, *new])
    like = np.where(np.arange(100) < 90, 0.1, 1.0)  # the others have 9 of weight left, the key has 10
    weights = like * claim_caps(traffic, like, 0.2)
    assert weights[:90] == pytest.approx(0.1)
    assert weights[90:].sum() == pytest.approx(0.2 * 19)
    alone = read([served(seq, {(FEEDBACK, "small"): 1.0}) for seq in range(1, 101)])
    assert claim_caps(alone, like, 0.2) == pytest.approx(np.ones(100))
    judged = read([served(seq, {("model", "small"): 1.0}) for seq in range(1, 101)])
    assert claim_caps(judged, like, 0.2) == pytest.approx(np.ones(100))


def test_a_verdict_by_the_clients_own_reference_is_the_clients_claim() -> None:
    labels = {("exact", "small"): 0.0, ("exact", "large"): 0.0}
    traffic = read([served(1, labels, reference="42"), served(2, labels)])
    assert [(claim.example, claim.pool) for claim in traffic.claims] == [(0, 0), (0, 1)]
    assert len(read([served(1, labels, reference="42")], untrusted=("a",)).examples) == 0


def test_an_untrusted_keys_claims_are_left_out_and_a_judges_labels_stay() -> None:
    records = [served(1, {(FEEDBACK, "small"): 0.0}), served(2, {(FEEDBACK, "small"): 0.0, ("model", "small"): 1.0})]
    (example,) = read(records, untrusted=("a",)).examples
    assert example.quality == {"small": 1.0}
    assert len(read(records, untrusted=("b",)).examples) == 2


def test_a_burst_of_near_duplicate_prompts_with_like_labels_is_left_out_with_the_reason() -> None:
    text = "please tell me whether the number {} is a prime number and explain in detail why it is one or is not"
    burst = [served(n, {(FEEDBACK, "small"): 0.0}, asked=text.format(n), time=float(n)) for n in range(1, 31)]
    other = served(40, {(FEEDBACK, "small"): 1.0}, key="b")
    traffic = read([*burst, other], burst=20)
    assert traffic.keys == ("b",)
    assert traffic.notes == (
        "30 records of key 'a' are a burst of near-duplicate prompts with like labels: its labels there are left out",
    )
    assert len(read([*burst[:19], other], burst=20).examples) == 20
    slow = [replace(item, record=replace(item.record, time=100.0 * item.record.time)) for item in burst]
    assert len(read(slow, burst=20).examples) == 30
    mixed = [served(n, {(FEEDBACK, "small"): (n % 3) / 2}, asked=text.format(n), time=float(n)) for n in range(1, 31)]
    assert len(read(mixed, burst=20).examples) == 30
    judged = [Labelled(i.record, (*i.labels, Label(i.record.seq, "large", "model", 1.0, seq=999))) for i in burst]
    assert {tuple(e.quality) for e in read(judged, burst=20).examples} == {("large",)}


def test_turns_of_a_conversation_are_held_out_together_and_a_common_opening_is_none() -> None:
    def turn(seq: int, conversation: str, asked: str | None = None) -> Labelled:
        return served(seq, {("model", "small"): 1.0}, asked, conversation=conversation)

    number = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    alone = [turn(20 + i, f"c{i}", " ".join(number[(i + j * (i + 1)) % 9] for j in range(6))) for i in range(9)]
    traffic = read([turn(1, "a", "why one"), turn(2, "b", "how two"), turn(3, "a", "and three"), *alone])
    assert traffic.group[0] == traffic.group[2] != traffic.group[1]
    assert traffic.conversation[0] == traffic.conversation[2] != traffic.conversation[1]
    greeted = read([turn(seq, "hello", word) for seq, word in enumerate(number)])
    assert len(set(greeted.group)) == len(set(greeted.conversation)) == 9


def test_a_prompts_task_is_the_group_of_its_newest_record() -> None:
    labels = {("math", "small"): 1.0}
    records = [served(seq, labels, "the same prompt", group=group) for seq, group in ((1, "a"), (3, "b"), (2, "c"))]
    traffic = read([*records, served(4, labels, "another")])
    assert [(example.prompt, example.task) for example in traffic.examples] == [
        ("the same prompt", "b"),
        ("another", ""),
    ]
