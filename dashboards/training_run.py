"""The Training run board: the progress of a `depo-train rl`, whether it learns, and what DEPO saves."""

from dashboards.board import TRAINING, Row, board
from dashboards.panels import WARN, above, lines, stat

T = TRAINING.these


def _figure(name: str) -> str:
    return f"training_{name}{{{T}}}"


NOW = Row(
    "Now",
    [
        stat(
            "Run",
            "The policy, and the selection of its prompts (depo: off, faithful, plus).",
            (f"training_run_info{{{T}}}", "{{policy}} depo={{depo}}"),
            names=True,
            width=6,
        ),
        stat(
            "Steps taken",
            "Of the planned steps.",
            (f"{_figure('step')} / {_figure('steps_planned')}", "{{job}}"),
            "percentunit",
            decimals=0,
            width=3,
        ),
        stat(
            "Time left",
            "At the speed of the last hour.",
            (
                f"({_figure('steps_planned')} - {_figure('step')})"
                f" * (rate(training_step_duration_seconds_sum{{{T}}}[1h])"
                f" / rate(training_step_duration_seconds_count{{{T}}}[1h]))",
                "{{job}}",
            ),
            "s",
            width=3,
        ),
        stat(
            "Last step",
            "Time since then. If much longer than a step, the run hangs or has ended.",
            (f"time() - {_figure('last_step_timestamp_seconds')}", "{{job}}"),
            "s",
            steps=[(None, "text"), (1800, WARN)],
            width=3,
        ),
        stat(
            "Last checkpoint",
            "Time since one was complete. A run that fails can be resumed from it.",
            (f"time() - {_figure('last_checkpoint_timestamp_seconds')}", "{{job}}"),
            "s",
            width=3,
        ),
        stat(
            "Completions saved",
            "Estimate for the whole run: completions of rejected prompts that would have had no advantage.",
            (_figure("completions_saved"), "{{job}}"),
            decimals=0,
            width=3,
        ),
        stat(
            "Rewards lost",
            "Completions that were not graded, in the time range: the reward function was too slow or failed.",
            (
                f"round(sum by (reason) (increase(training_lost_rewards_total{{{T}}}[$__range])))",
                "{{reason}}",
            ),
            decimals=0,
            steps=above(1, None),
            width=3,
        ),
    ],
)

POLICY = Row(
    "The policy",
    [
        lines(
            "Reward",
            "Mean over completions, in total and by reward function, and the deviation within a group: at 0 nothing "
            "can be learned.",
            [
                (_figure("reward"), "mean"),
                (_figure("function_reward"), "{{function}}"),
                (_figure("reward_std"), "deviation"),
            ],
            at_least=None,
        ),
        lines(
            "Loss and gradient",
            "The policy's loss, and the norm of its gradient before clipping. A norm that explodes precedes a reward "
            "that collapses.",
            [(_figure("loss"), "loss"), (_figure("grad_norm"), "gradient norm")],
            at_least=None,
        ),
        lines(
            "Entropy, divergence, clipping",
            "Entropy near 0: the policy always gives the same answer. kl: divergence from the reference policy, only "
            "with beta above 0. clipped: share of tokens whose probability ratio is clipped.",
            [(_figure("entropy"), "entropy"), (_figure("kl"), "kl"), (_figure("clip_ratio"), "clipped")],
        ),
        lines(
            "Length of completions",
            "Mean tokens.",
            (_figure("completion_tokens"), "tokens"),
            width=6,
        ),
        lines(
            "Cut off, or without reward",
            "Shares of the completions: cut off at the maximum length, and not graded by any reward function.",
            [(_figure("truncated_ratio"), "cut off"), (_figure("missing_rewards_ratio"), "no reward")],
            "percentunit",
            at_most=1,
            width=6,
        ),
        lines("Learning rate", "Of the policy.", (_figure("learning_rate"), "learning rate"), "sci", width=6),
        lines(
            "Passes over the data",
            "Passes of the prompt stream over the data set; rounds per generation (dynamic sampling).",
            [(_figure("data_epoch"), "epochs"), (_figure("rounds"), "rounds")],
            width=6,
        ),
    ],
)

SELECTION = Row(
    "Prompt selection",
    [
        lines(
            "Prompts rolled out without advantage",
            "All completions right, or all wrong: wasted. DEPO lowers the share among the prompts `rolled out`; "
            "`trained on` is the share that reaches the policy.",
            [
                (_figure("zero_advantage_ratio"), "rolled out"),
                (_figure("zero_advantage_trained_ratio"), "trained on"),
            ],
            "percentunit",
            at_most=1,
        ),
        lines(
            "Kept, and wrongly rejected",
            "kept: share of the considered prompts that were rolled out. wrongly rejected: share of the explored "
            "rejects that had an advantage.",
            [(_figure("kept_ratio"), "kept"), (_figure("false_reject_ratio"), "wrongly rejected")],
            "percentunit",
            at_most=1,
        ),
        lines(
            "Pass rate of rollouts",
            "A group is most informative near one half.",
            (_figure("pass_rate"), "pass rate"),
            "percentunit",
            at_most=1,
        ),
        lines(
            "Prompts per minute",
            "Scored before a rollout, rolled out (by whether a group had an advantage), and explored against "
            "the scores.",
            [
                (f"60 * rate(training_scored_prompts_total{{{T}}}[$__rate_interval])", "scored"),
                (
                    f"60 * sum by (advantage) (rate(training_groups_total{{{T}}}[$__rate_interval]))",
                    "rolled out, advantage {{advantage}}",
                ),
                (f"60 * rate(training_explored_prompts_total{{{T}}}[$__rate_interval])", "explored"),
            ],
        ),
        lines(
            "The estimator's predictions",
            "On the 512 newest groups. auroc: how well it recognises groups with an advantage; 0.5 is chance. "
            "calibration error: of the predicted quality.",
            [
                (_figure("estimator_auroc"), "auroc"),
                (_figure("estimator_calibration_error"), "calibration error"),
            ],
            at_most=1,
        ),
        lines(
            "The estimator's loss",
            "By term, before the newest update.",
            (_figure("estimator_loss"), "{{term}}"),
            at_least=None,
        ),
    ],
)

TIME = Row(
    "Time",
    [
        lines(
            "A step, by part",
            "Seconds per step: selecting prompts, rolling them out, updating the estimator, and the rest (the policy).",
            (
                f"sum by (part) (rate(training_seconds_total{{{T}}}[$__rate_interval]))"
                f" / on () group_left () sum(rate(training_step_duration_seconds_count{{{T}}}[$__rate_interval]))",
                "{{part}}",
            ),
            "s",
            stacked=True,
        ),
        lines(
            "Completions per minute",
            "Rolled out, which is most of the cost; unreadable: finished without a result that the verifier can read.",
            [
                (f"60 * rate(training_completions_total{{{T}}}[$__rate_interval])", "{{job}}"),
                (f"60 * rate(training_unreadable_completions_total{{{T}}}[$__rate_interval])", "unreadable"),
            ],
        ),
        lines(
            "Tokens",
            "Per second, of prompts and completions.",
            (f"rate(training_tokens_total{{{T}}}[$__rate_interval])", "{{job}}"),
        ),
    ],
)

BOARD = board(
    "training-run",
    "Training run",
    "A depo-train rl with metrics_listen: its progress, whether it learns, and what DEPO saves.",
    [TRAINING],
    [],
    [NOW, POLICY, SELECTION, TIME],
)
