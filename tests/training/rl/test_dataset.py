import pytest
from datasets import Dataset

from depo_gateway.training.rl.dataset import prepare_rows


@pytest.mark.parametrize("absent", [0, 1500])  # map guesses the column's type from its first 1,000 rows
def test_a_row_without_an_answer_has_none(absent: int) -> None:
    answers = [None] * absent + [18, None]
    rows = Dataset.from_list([{"prompt": "1+1", "gold": {"truth": answer}} for answer in answers])
    wanted = [None] * absent + ["18", None]
    assert prepare_rows(rows, "prompt", "gold.truth", None, chat=False)["answer"][:] == wanted
    flat = Dataset.from_dict({"prompt": ["1+1"] * len(answers), "answer": answers})
    assert prepare_rows(flat, "prompt", "answer", None, chat=False)["answer"][:] == wanted


def test_a_nested_column_that_no_row_has_is_named() -> None:
    rows = Dataset.from_dict({"prompt": ["1+1"], "gold": [{"truth": "2"}], "extra": [{"truth": None}]})
    for prompt, answer, named in (
        ("prompt", "gold.truht", "gold.truht"),
        ("prompt", "extra.truth", "extra.truth"),
        ("gold.text", "gold.truth", "gold.text"),
    ):
        with pytest.raises(ValueError, match=f"^no row of the dataset has a value in the column '{named}'$"):
            prepare_rows(rows, prompt, answer, None, chat=False)
