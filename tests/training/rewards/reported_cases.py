"""Pairs of completion and reference with the right reward, in reported_cases.jsonl.

They cover the kinds of fault that users of public graders report (lm-evaluation-harness, Math-Verify, simple-evals,
verl, open-r1, OpenCompass, inspect_ai, lighteval, HELM), in words of our own. A reward of null: no label, because the
verifier cannot use the reference.
"""

import json
from pathlib import Path


def misgraded(verifier: str) -> list[tuple[str, str, float | None, float | None]]:
    """(completion, reference, right reward, reward given) of each pair that the verifier grades otherwise."""
    from depo_gateway.training.rewards.verifiers import Grader

    lines = (Path(__file__).with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["verifier"] == verifier]
    assert len(cases) > 40
    grader = Grader(verifier, deadline_s=30.0)
    try:
        rewards = grader.grade([(case["completion"], case["reference"]) for case in cases])
    finally:
        grader.close()
    return [
        (case["completion"], case["reference"], case["reward"], reward)
        for case, reward in zip(cases, rewards, strict=True)
        if case["reward"] != reward
    ]
