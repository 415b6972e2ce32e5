"""Whether an outcome table's groups are used in scoring: `--groups` of evaluate and calibrate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from depo_gateway.estimator.checkpoint import Manifest


def chosen_groups(groups: Sequence[str], used: bool, manifest: Manifest, command: str) -> tuple[str, ...]:
    """The groups (N,) of the prompts if they are `used`, else none ("").

    Says on stderr where using them makes no difference, and where leaving them out does.
    """
    known = set(manifest.base.groups)
    count = sum(group in known for group in groups)
    if used and not known:
        _say(command, "--groups makes no difference: the checkpoint knows no groups (depo-train fit --groups)")
    elif used and not count:
        _say(command, "--groups makes no difference: the checkpoint knows none of the groups of these prompts")
    elif count and not used:
        _say(
            command,
            f"the checkpoint knows the groups of {count} of these {len(groups)} prompts, and they are left out; for a"
            " gateway with routing.group give --groups",
        )
    return tuple(groups) if used else ("",) * len(groups)


def _say(command: str, sentence: str) -> None:
    sys.stderr.write(f"depo-train {command}: {sentence}\n")
