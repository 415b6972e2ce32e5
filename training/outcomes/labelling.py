"""The labels of a prompt's completions: by a verifier and the prompt's reference, or by a judge without one."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from depo_gateway.estimator.records.types import Record
from depo_gateway.training.judging.judges import Judge
from depo_gateway.training.judging.openai_client import NoAnswerError, mean, together
from depo_gateway.training.judging.pool_client import CHARS_PER_TOKEN
from depo_gateway.training.judging.rubric import request_text, rubric_prompt
from depo_gateway.training.judging.spend_cap import SpendCap
from depo_gateway.training.outcomes.completions import NO_VERDICT, TOKENS, Completion, ModelLabel
from depo_gateway.training.outcomes.prompts import Prompt
from depo_gateway.training.rewards.verdicts import GRADED
from depo_gateway.training.rewards.verifiers import Grader
from depo_gateway.training.rewards.worker_pool import RewardError

MOST_JUDGE_FAILURES = 3  # in a row: the judge is unreachable
SILENT_PROMPTS = 20  # judged without any verdict from the start: the judge can't judge

# (prompt, completions by model) -> labels by model; None: no label now, so that the prompt is asked again another time
Labeller = Callable[[Prompt, Mapping[str, Sequence[Completion]]], Awaitable[Mapping[str, ModelLabel] | None]]


class JudgeError(Exception):
    """The judge does not answer, or has no verdicts; the message is one line for the user."""


def by_verifier(grader: Grader) -> Labeller:
    """Labels each finished completion by the verifier. It raises RewardError where a function of the user's fails."""

    async def label(prompt: Prompt, completions: Mapping[str, Sequence[Completion]]) -> Mapping[str, ModelLabel]:
        return {model: await _verified(grader, prompt, of_model) for model, of_model in completions.items()}

    return label


async def _verified(grader: Grader, prompt: Prompt, completions: Sequence[Completion]) -> ModelLabel:
    pairs = [(completion.text, prompt.reference or "") for completion in completions if not completion.end]
    verdicts = await asyncio.to_thread(grader.verdicts, pairs) if pairs else []
    for verdict in verdicts:
        if verdict.reward is not None and not 0 <= verdict.reward <= 1:
            raise RewardError(f"the verifier {grader.name} gave {verdict.reward:g}; an outcome is between 0 and 1")
    return _label(completions, [(verdict.outcome, verdict.reward) for verdict in verdicts])


class JudgeLabels:
    """Labels completions by a judge: the i-th finished completion of each pool together.

    Args:
        judge: scores answers by pool.
        pools: the pool of each model.
        calls: of the judge, for one judgement of so many answers.
        verdict_tokens: the most tokens of one call's verdict; 0: the judge's tokens are not counted.
        gate: limits the judgements in progress.
    """

    def __init__(
        self,
        judge: Judge,
        pools: Mapping[str, str],
        calls: Callable[[int], int],
        verdict_tokens: int,
        cap: SpendCap,
        gate: asyncio.Semaphore,
    ) -> None:
        self.unanswered = 0  # prompts without a row because of the judge
        self._judge, self._pools, self._calls = judge, pools, calls
        self._verdict_tokens, self._cap, self._gate = verdict_tokens, cap, gate
        self._failures = 0  # judgements in a row
        self._silent: int | None = 0  # prompts without a verdict; None: there was one

    async def label(
        self, prompt: Prompt, completions: Mapping[str, Sequence[Completion]]
    ) -> Mapping[str, ModelLabel] | None:
        """Labels by model; None where the judge answered none of the prompt's judgements, or gave no verdict and has
        not given any yet.

        Raises:
            SpentError: the cap does not allow them.
            JudgeError: the judge is unreachable, or never has a verdict.
        """
        finished = {model: [each.text for each in some if not each.end] for model, some in completions.items()}
        rounds = [
            {self._pools[model]: texts[index] for model, texts in finished.items() if index < len(texts)}
            for index in range(max(map(len, finished.values()), default=0))
        ]
        calls = sum(self._calls(len(answers)) for answers in rounds)
        async with self._cap.reserve(calls, sum(self._tokens(prompt, answers) for answers in rounds)):
            verdicts = await together(*(self._judged(prompt, index, answers) for index, answers in enumerate(rounds)))
        if calls and (all(verdict is None for verdict in verdicts) or self._is_silent(any(verdicts))):
            self.unanswered += 1
            return None
        scores = {
            model: [
                verdict.get(self._pools[model]) if verdict else None
                for verdict, _ in zip(verdicts, texts, strict=False)
            ]
            for model, texts in finished.items()
        }
        return {
            model: _label(some, [(NO_VERDICT if one is None else GRADED, one) for one in scores[model]])
            for model, some in completions.items()
        }

    def _is_silent(self, judged: bool) -> bool:
        """Whether the judge has had no verdict since the start."""
        if judged:
            self._silent = None
        elif self._silent is not None:
            self._silent += 1
            if self._silent >= SILENT_PROMPTS:
                raise JudgeError(
                    f"the judge had no verdict on {SILENT_PROMPTS} prompts: a model must reply with the JSON object"
                    " that it is asked for, within --judge-max-tokens; a webhook with scores by pool"
                )
        return self._silent is not None

    async def _judged(self, prompt: Prompt, index: int, answers: Mapping[str, str]) -> Mapping[str, float] | None:
        """The scores by pool; None where the judge does not answer."""
        record = _record(prompt, index)
        async with self._gate:
            try:
                verdict = await self._judge(record, answers)
            except NoAnswerError as error:
                self._failures += 1
                if self._failures >= MOST_JUDGE_FAILURES:
                    raise JudgeError(f"the judge does not answer: {error}") from None
                return None
        self._failures = 0
        return verdict

    def _tokens(self, prompt: Prompt, answers: Mapping[str, str]) -> int:
        """An upper estimate of the tokens that one judgement takes."""
        if not self._verdict_tokens:
            return 0
        request = request_text(_record(prompt, 0))
        return sum(
            2 * (2 * len(rubric_prompt(request, one, other)) // CHARS_PER_TOKEN + self._verdict_tokens)
            for one, other in combinations(answers.values(), 2)
        )


def _record(prompt: Prompt, index: int) -> Record:
    """The prompt as judges read it."""
    return Record(f"line-{prompt.line}-{index}", 0.0, asked=prompt.messages, reference=prompt.reference)


def _label(completions: Sequence[Completion], verdicts: Sequence[tuple[str, float | None]]) -> ModelLabel:
    """The mean score, from the outcomes and scores of the completions that finished; with the counts of all."""
    of_finished = iter(verdicts)
    every = [(each.end, None) if each.end else next(of_finished) for each in completions]
    outcomes, scores = [outcome for outcome, _ in every], [score for _, score in every]
    known = [score for score in scores if score is not None]
    counts: dict[str, Any] = dict(Counter(outcomes))
    lengths = [completion.tokens for completion in completions if not completion.end and completion.tokens is not None]
    return ModelLabel(mean(known) if known else None, counts | ({TOKENS: lengths} if lengths else {}), outcomes, scores)
