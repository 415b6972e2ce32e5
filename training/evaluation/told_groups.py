"""Which groups of an outcome table a checkpoint is told: `--groups` of evaluate and calibrate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from depo_gateway.estimator.checkpoint import Manifest


def told_groups(groups: Sequence[str], told: bool, manifest: Manifest, command: str) -> tuple[str, ...]:
    """The groups (N,) of the prompts if they are `told`, else none ("").

    Says on stderr where telling them makes no difference, and where not telling them does.
    """
    known = set(manifest.base.groups)
    count = sum(group in known for group in groups)
    if told and not known:
        _say(command, "--groups makes no difference: the checkpoint knows no groups (depo-train fit --groups)")
    elif told and not count:
        _say(command, "--groups makes no difference: the checkpoint knows none of the groups of these prompts")
    elif count and not told:
        _say(
            command,
            f"the checkpoint knows the groups of {count} of these {len(groups)} prompts, and is not told them; for a"
            " gateway with routing.group give --groups",
        )
    return tuple(groups) if told else ("",) * len(groups)


def _say(command: str, sentence: str) -> None:
    sys.stderr.write(f"depo-train {command}: {sentence}\n")
