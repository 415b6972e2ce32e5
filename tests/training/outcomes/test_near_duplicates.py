"""Which prompts count as near-duplicates."""

from depo_gateway.training.outcomes.near_duplicates import near_duplicate_clusters


def test_arithmetic_is_a_near_duplicate_of_itself_alone() -> None:
    assert near_duplicate_clusters(["1+2=", "1+2=", "7*3-4="], 0.8).tolist() == [0, 0, 2]


def test_near_duplicates_are_found_by_their_words() -> None:
    text = "Natalia sold {} clips to her friends in April and half as many in May; how many altogether"
    found = near_duplicate_clusters(
        [text.format(48), text.format(7).upper(), "something else", text.format("no").replace("half", "a third")], 0.8
    )
    assert found[0] == found[1]
    assert len(set(found.tolist())) == 3
    assert near_duplicate_clusters(["", "  ", "?!"], 0.8)[2] == 2
