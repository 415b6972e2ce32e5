from depo_gateway.training.evaluation.markdown import apgr_table, table, with_interval
from depo_gateway.training.evaluation.routing_metrics import ApgrEstimate


def test_a_table_is_markdown() -> None:
    assert table([("a", 1)], ("name", "x")) == "| name | x |\n|------|---|\n| a    | 1 |"


def test_figures_have_their_intervals() -> None:
    assert with_interval(0.7119, 0.69, 0.731) == "0.712 [0.690, 0.731]"
    assert with_interval(0.1, -0.02, 0.2, "+") == "+0.100 [-0.020, +0.200]"


def test_length_is_not_compared_with_itself() -> None:
    estimate = ApgrEstimate(0.6, 0.55, 0.65, 0.1, 0.05, 0.15)
    _, _, random, length, gain = apgr_table({"length": estimate, "gain": estimate}).splitlines()
    assert random.split("|")[2].strip() == "0.500"
    assert length.split("|")[4].strip() == ""
    assert gain.split("|")[4].strip() == "+0.100 [+0.050, +0.150]"
