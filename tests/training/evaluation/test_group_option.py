"""When a table's groups are used in scoring, and what is said about it."""

import dataclasses
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.training.evaluation.group_option import chosen_groups


@pytest.mark.parametrize(
    ("known", "groups", "told", "said"),
    [
        (("a", "b"), ("a", "x", ""), True, ""),
        (
            ("a", "b"),
            ("a", "x", ""),
            False,
            "the checkpoint knows the groups of 1 of these 3 prompts, and they are left out",
        ),
        (("a", "b"), ("x", "", ""), True, "makes no difference: the checkpoint knows none of the groups"),
        (("a", "b"), ("x", "", ""), False, ""),
        ((), ("a", "x", ""), True, "makes no difference: the checkpoint knows no groups"),
        ((), ("a", "x", ""), False, ""),
    ],
)
def test_the_flag_decides_and_one_line_says_what_that_changes(
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    known: tuple[str, ...],
    groups: tuple[str, ...],
    told: bool,
    said: str,
) -> None:
    manifest = checkpoint.load_manifest(tiny_checkpoint)
    manifest = dataclasses.replace(manifest, base=dataclasses.replace(manifest.base, groups=known))
    assert chosen_groups(groups, told, manifest, "evaluate") == (groups if told else ("", "", ""))
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)
