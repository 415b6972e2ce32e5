from depo_gateway.training.rewards.exact import grade_exact
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RIGHT, WRONG
from tests.training.rewards.reported_cases import misgraded


def test_the_kinds_of_fault_that_users_of_graders_report() -> None:
    assert misgraded("exact") == []


def test_exact_is_blind_to_case_space_and_outer_punctuation() -> None:
    assert grade_exact("  The  Nile.\n", "the nile") == RIGHT
    assert grade_exact("The Nile river", "the nile") == WRONG


def test_an_empty_completion_is_not_readable_and_an_empty_reference_no_label() -> None:
    assert grade_exact(" ", "Nile") == grade_exact("<think>Nile", "Nile") == NOT_READABLE
    assert grade_exact("Nile", " ") == NO_REFERENCE
    assert grade_exact("?", "!") == WRONG
