"""The runs' results -> README.md, plots and runs.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.depo.figures import interval
from benchmarks.overhead import cpu
from benchmarks.replay.figures import (
    Run,
    at_labels,
    by_seed,
    compact,
    label_counts,
    mean_text,
    pooled,
    runs_from,
    signed_mean_text,
)
from benchmarks.replay.plots import WINDOW, draw
from benchmarks.replay.questions import POOLS
from depo_gateway.training.evaluation.markdown import table

INTRO = """\
# The online loop, replayed

`python -m benchmarks.replay --data DIR --report benchmarks/results/replay`. A real gateway (records on SQLite, prompts
full, `routing.target: {{large_share: {target}}}`, 2% exploration) and a real `depo-train refresh --follow` beside it,
which asks the pool that did not serve (shadow share 1) and judges by the client's reference (`exact`). Scripted
backends answer right or wrong by the table: Mixtral-8x7B is small, GPT-4 large. A label is a question with both pools'
outcomes, obtained by shadowing alone. The gateway is never restarted and loads new checkpoints while it serves; the
learner is restarted on the way. {seeds}: a seed is a random order of MMLU's questions, which represents time.
Intervals: 95%, Student's t over seeds, unless stated otherwise. {machine}, {minutes:.0f} minutes in all.

Slightly optimistic: how a refresh learns (its epochs and rates, the prior of the joint calibration, the weights of old
labels) was chosen on these same tables, in other and partly the same orders.

Time is compressed: hours of traffic pass in seconds. So traffic slows down to {slow} requests a second, without
references, until the learner has trained; `learn.traffic.burst_seconds` is 1 (one key asks everything here);
`deadline_ms` is long, since all processes share a core; and `sticky` is off, because fill-in questions are asked
again."""
MMLU = """\
## Labels and routing: MMLU

APGR of the version that is served after so many labels, on the {later:,} questions that come later and are never
labelled; random is 0.5. A refused candidate leaves the old version in service. `general` starts from a checkpoint that
was fitted on GSM8K and MATH: the shipped one was fitted on these very MMLU questions. `--cold` starts from fresh
heads."""
SWITCH = """\
## A switch of traffic: MMLU, then GSM8K

The cold runs continue with GSM8K. Each question is asked once with its reference, and counts below only as decided
then, by a version that had never seen it. `over random`: quality of the served answers minus that of random routing at
the same large share on the same questions, exploration included. APGR: of the version that decided, all seeds'
questions together, with 95% bootstrap intervals over questions; prompt length on the same questions."""
SHARES = """\
## The realised large share

The largest deviation of the large share of {window:,} consecutive routed requests from the target of {target}, in
windows wholly before the switch, across it, and wholly after it. GSM8K questions are asked again to fill the last
ones."""
CALIBRATION = """\
## Calibration after refresh

Expected calibration error in 10 equally full bins, on the same {later:,} later MMLU questions (cold start), and the
error that a perfect model has on as many questions by chance: outcomes drawn from its own predictions, the pools'
correlated as they are. Aim: at most .03."""


def report(runs: Sequence[Run], out: Path) -> None:
    """Writes all of it into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.json").write_text(json.dumps([compact(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    draw(runs, out)
    (out / "README.md").write_text("\n\n".join(parts(runs)) + "\n", encoding="utf-8")


def parts(runs: Sequence[Run]) -> list[str]:
    from benchmarks.replay.run import SLOW

    target, later = runs[0]["share"]["target"], int(runs[0]["start"]["mmlu"]["questions"])
    by_scenario: dict[str, list[int]] = {}
    for run in runs:
        by_scenario.setdefault(run["scenario"], []).append(run["seed"])
    seeds = "; ".join(f"{name}: seeds {', '.join(map(str, sorted(of)))}" for name, of in sorted(by_scenario.items()))
    seeds = seeds.capitalize()
    machine = f"{cpu()}, one thread a process, Python {platform.python_version()}"
    minutes = sum(run["seconds"] for run in runs) / 60
    text = [INTRO.format(target=target, seeds=seeds, machine=machine, minutes=minutes, slow=SLOW)]
    text += [
        "## Aims and results",
        aims_table(runs),
        MMLU.format(later=later),
        learning_table(runs),
        "![learning and calibration](learning.png)",
    ]
    switched = [run for run in runs if "switch" in run]
    if switched:
        text += [SWITCH, switch_table(switched), "![the switch](switch.png)"]
        text += [SHARES.format(window=WINDOW, target=target), share_table(switched)]
    if runs_from(runs, "cold"):
        text += [CALIBRATION.format(later=later), calibration_table(runs_from(runs, "cold"))]
    return [*text, "## What was published and refused", refusal_table(runs), closing(runs)]


def aims_table(runs: Sequence[Run]) -> str:
    """The aims, and the results."""
    rows: list[tuple[str, str, str]] = []
    for start in ("cold", "general"):
        mine = runs_from(runs, start)
        counts = label_counts(mine) if mine else []
        if 500 in counts:
            over = np.subtract(at_labels(mine, 500, "apgr"), at_labels(mine, 500, "length")).tolist()
            mean, low, _ = interval(over)
            rows.append(
                (
                    f"MMLU, {start} start: above prompt length by 500 labels",
                    signed_mean_text(over),
                    met(mean > 0, low > 0),
                )
            )
        if 1500 in counts:
            found = at_labels(mine, 1500, "apgr")
            mean, low, _ = interval(found)
            wanted = f"MMLU, {start} start: APGR .62 by 1,500 labels"
            rows.append((wanted, mean_text(found), met(mean >= 0.62, low >= 0.62)))
            for name in (*POOLS, "gain"):
                errors = at_labels(mine, 1500, f"ece_{name}")
                measured = f"{mean_text(errors)}; worst {max(errors):.3f}"
                wanted = f"{start} start: calibration error of {name} at most .03 after 1,500 labels"
                rows.append(
                    (wanted, measured, f"{met(np.mean(errors) <= 0.03)}; in every seed: {met(max(errors) <= 0.03)}")
                )
    switched = [run for run in runs if "switch" in run]
    if switched:
        blocks = [[run["switch"][b]["advantage"] for run in switched] for b in range(len(switched[0]["switch"]))]
        above = [len(block) < 2 or interval(block)[2] >= 0 for block in blocks]
        measured = ", ".join(signed_mean_text(block) for block in blocks)
        rows.append(("switch: never significantly below random routing at equal cost", measured, met(all(above))))
        if (last := pooled(switched, len(blocks) - 1)) is not None:
            point, low, high = last["over"]
            measured = f"{last['gain'][0]:.3f} against {last['length'][0]:.3f}, {point:+.3f} [{low:+.3f}, {high:+.3f}]"
            wanted = "switch: recovered by 500 labels, that is, APGR above prompt length on the same questions"
            rows.append((wanted, measured, met(point > 0, low > 0)))
        worst = max(run["share"][name] for run in switched for name in ("before", "across", "after"))
        rows.append(("large share within 2 points in every window", f"{worst:.4f} at worst", met(worst <= 0.02)))
    failed = sum(len(run["failures"]) for run in runs)
    rows.append(("no request fails while checkpoints are swapped", f"{failed} failed", met(failed == 0)))
    return table(rows, ("aim", "measured", "met"))


def met(on_average: bool | np.bool_, surely: bool | np.bool_ = True) -> str:
    """`surely`: also significantly."""
    if not on_average:
        return "no"
    return "yes" if surely else "on average, not significantly"


def learning_table(runs: Sequence[Run]) -> str:
    starts = [(name, mine) for name in ("cold", "general") if (mine := runs_from(runs, name))]
    counts = label_counts(runs)
    rows = []
    for count in (0, *counts):
        cells = [mean_text(at_labels(mine, count, "apgr")) for _, mine in starts]
        over = [
            signed_mean_text(np.subtract(at_labels(mine, count, "apgr"), at_labels(mine, count, "length")).tolist())
            for _, mine in starts
        ]
        rows.append((count, *(cell for pair in zip(cells, over, strict=True) for cell in pair)))
    header = ["labels", *(word for name, _ in starts for word in (f"{name} start", "over prompt length, paired"))]
    length = mean_text(at_labels(starts[0][1], 0, "length"))
    return table(rows, header) + f"\n\nPrompt length: {length}."


def switch_table(runs: Sequence[Run]) -> str:
    rows = []
    for block in range(len(runs[0]["switch"])):
        of = [run["switch"][block] for run in runs]
        first = sum(row["questions"] for row in runs[0]["switch"][:block])
        found = pooled(runs, block)
        cells = ["-"] * 2
        if found is not None:
            cells = [f"{point:.3f} [{low:.3f}, {high:.3f}]" for point, low, high in (found["gain"], found["length"])]
        rows.append(
            (
                f"{first} to {first + of[0]['questions']}",
                signed_mean_text([row["advantage"] for row in of]),
                signed_mean_text([row["gap"] for row in of]),
                mean_text([row["large_share"] for row in of], 2),
                *cells,
                mean_text(by_seed(runs, block)) if found is not None else "-",
            )
        )
    header = ("GSM8K labels", "over random", "gap of the pools", "large share", "APGR", "of prompt length", "by seed")
    return table(rows, header)


def share_table(runs: Sequence[Run]) -> str:
    where = ("before", "across", "after")
    rows = [(run["seed"], *(f"{run['share'][name]:.4f}" for name in where)) for run in runs]
    rows.append(("worst", *(f"{max(run['share'][name] for run in runs):.4f}" for name in where)))
    return table(rows, ("seed", *where))


def calibration_table(runs: Sequence[Run]) -> str:
    rows = []
    for count in label_counts(runs):
        cells = []
        for name in (*POOLS, "gain"):
            errors = at_labels(runs, count, f"ece_{name}")
            cells += [
                f"{mean_text(errors)}; worst {max(errors):.3f}",
                f"{np.mean(at_labels(runs, count, f'chance_{name}')):.3f}",
            ]
        rows.append((count, *cells))
    return table(rows, ("labels", *(word for name in (*POOLS, "gain") for word in (name, "by chance"))))


def refusal_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        refused = {one["labels"] for one in run["refusals"]}
        published = [str(v["labels"]) for v in run["versions"] if v["labels"] not in refused]
        reasons = "; ".join(f"{one['labels']}: {short(one['reasons'])}" for one in run["refusals"])
        rows.append((run["scenario"], run["seed"], ", ".join(published), reasons or "-"))
    return table(rows, ("scenario", "seed", "published at labels", "refused at labels"))


def short(reasons: Sequence[str]) -> str:
    return ", and ".join(reason.partition(":")[0] for reason in reasons)


def closing(runs: Sequence[Run]) -> str:
    failures, requests = sum(len(run["failures"]) for run in runs), sum(run["requests"] for run in runs)
    worst = max(run["score_difference"] for run in runs)
    return (
        f"{failures} of {requests:,} requests failed. The scores that the gateway recorded and those measured here"
        f" differ by {worst:.0e} at most."
    )
