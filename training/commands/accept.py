"""`depo-train accept`: publishes the checkpoint that the learner holds back because it raises the cost. No torch.

It works while the learner runs: `current` is replaced atomically, and the learner takes it for its new champion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from depo_gateway.estimator import checkpoint, held_publish, standing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the learner's directory of checkpoints")


def run(args: argparse.Namespace) -> int:
    """The command: 0 published. Raises ValueError where nothing is held, or what is held is out of date."""
    held = held_publish.read_held(args.out)
    if held is None:
        raise ValueError(f"no checkpoint is held back in {args.out}")
    place = args.out / held.checkpoint
    manifest, _ = checkpoint.load_checkpoint(place)
    served = checkpoint.load_manifest(checkpoint.resolve(args.out)).version if (args.out / "current").exists() else ""
    if served and served not in (held.champion, manifest.version):
        raise ValueError(
            f"{held.checkpoint} was compared with {held.champion or 'no checkpoint'}, but {args.out / 'current'} now"
            f" names {served}; let the next refresh compare with that, or write {held.checkpoint} into current yourself"
        )
    checkpoint.publish(place)
    if held.standing is not None:
        standing.write_standing(args.out, held.standing)
    held_publish.remove_held(args.out)
    sys.stdout.write(f"published {manifest.version}: {args.out / 'current'} now names {held.checkpoint}\n")
    return 0
