"""The Training run board: one `depo-train rl`, how far it is, whether it learns, and what DEPO saves it."""

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
            "The policy, and what selects its prompts (depo: off, faithful, plus).",
            (f"training_run_info{{{T}}}", "{{policy}} depo={{depo}}"),
            names=True,
            width=6,
        ),
        stat(
            "Steps taken",
            "Of those planned.",
            (f"{_figure('step')} / {_figure('steps_planned')}", "{{job}}"),
            "percentunit",
            decimals=0,
            width=3,
        ),
        stat(
            "Left",
            "At the pace of the last hour.",
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
            "How long ago. Much more than a step takes: the run hangs, or has ended.",
            (f"time() - {_figure('last_step_timestamp_seconds')}", "{{job}}"),
            "s",
            steps=[(None, "text"), (1800, WARN)],
            width=3,
        ),
        stat(
            "Last checkpoint",
            "How long ago one was whole. A run that dies goes on from there.",
            (f"time() - {_figure('last_checkpoint_timestamp_seconds')}", "{{job}}"),
            "s",
            width=3,
        ),
        stat(
            "Completions saved",
            "An estimate for the whole run: completions of rejected prompts that would have had no advantage.",
            (_figure("completions_saved"), "{{job}}"),
            decimals=0,
            width=3,
        ),
        stat(
            "Rewards lost",
            "Completions whose grading came to nothing, in the time shown: the reward function was too slow or failed.",
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
            "Mean of the completions, each reward function's, and the deviation within a group: at 0 nothing can be "
            "learned from it.",
            [
                (_figure("reward"), "mean"),
                (_figure("function_reward"), "{{function}}"),
                (_figure("reward_std"), "deviation"),
            ],
            at_least=None,
        ),
        lines(
            "Loss and gradient",
            "The policy's loss, and the norm of its gradient before it is clipped. A norm that explodes comes before a "
            "reward that collapses.",
            [(_figure("loss"), "loss"), (_figure("grad_norm"), "gradient norm")],
            at_least=None,
        ),
        lines(
            "Entropy, divergence, clipping",
            "Entropy near 0: the policy says always the same. kl: from the reference policy, with beta above 0 only. "
            "clipped: share of tokens whose probability ratio is.",
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
            "Shares of the completions: cut off at their longest, and those that no reward function graded.",
            [(_figure("truncated_ratio"), "cut off"), (_figure("missing_rewards_ratio"), "no reward")],
            "percentunit",
            at_most=1,
            width=6,
        ),
        lines("Learning rate", "Of the policy.", (_figure("learning_rate"), "learning rate"), "sci", width=6),
        lines(
            "Through the data",
            "How often the stream of prompts went through the data set; rounds a generation took (dynamic sampling).",
            [(_figure("data_epoch"), "epochs"), (_figure("rounds"), "rounds")],
            width=6,
        ),
    ],
)

SELECTION = Row(
    "What DEPO selects",
    [
        lines(
            "Prompts rolled out without advantage",
            "All completions right, or all wrong: wasted. `rolled out` is what DEPO lowers; `trained on` what is left "
            "of it for the policy.",
            [
                (_figure("zero_advantage_ratio"), "rolled out"),
                (_figure("zero_advantage_trained_ratio"), "trained on"),
            ],
            "percentunit",
            at_most=1,
        ),
        lines(
            "Kept, and wrongly rejected",
            "kept: share of the prompts considered that were rolled out. wrongly rejected: of the rejects that were "
            "explored, those with an advantage after all.",
            [(_figure("kept_ratio"), "kept"), (_figure("false_reject_ratio"), "wrongly rejected")],
            "percentunit",
            at_most=1,
        ),
        lines(
            "Pass rate of what was rolled out",
            "Near one half a group teaches most.",
            (_figure("pass_rate"), "pass rate"),
            "percentunit",
            at_most=1,
        ),
        lines(
            "Prompts a minute",
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
            "On the 512 newest groups. auroc: how well it tells groups with an advantage; 0.5 is chance. calibration "
            "error: of the predicted quality.",
            [
                (_figure("estimator_auroc"), "auroc"),
                (_figure("estimator_calibration_error"), "calibration error"),
            ],
            at_most=1,
        ),
        lines(
            "The estimator's loss",
            "By term, before its newest update.",
            (_figure("estimator_loss"), "{{term}}"),
            at_least=None,
        ),
    ],
)

TIME = Row(
    "Where the time goes",
    [
        lines(
            "A step, by part",
            "Seconds a step: choosing prompts, rolling them out, updating the estimator, and the rest (the policy).",
            (
                f"sum by (part) (rate(training_seconds_total{{{T}}}[$__rate_interval]))"
                f" / on () group_left () sum(rate(training_step_duration_seconds_count{{{T}}}[$__rate_interval]))",
                "{{part}}",
            ),
            "s",
            stacked=True,
        ),
        lines(
            "Completions a minute",
            "Rolled out; that is where most of the cost is.",
            (f"60 * rate(training_completions_total{{{T}}}[$__rate_interval])", "{{job}}"),
        ),
        lines(
            "Tokens",
            "A second, of prompts and completions.",
            (f"rate(training_tokens_total{{{T}}}[$__rate_interval])", "{{job}}"),
        ),
    ],
)

BOARD = board(
    "training-run",
    "Training run",
    "One depo-train rl with metrics_listen: how far it is, whether it learns, and what DEPO saves it.",
    [TRAINING],
    [],
    [NOW, POLICY, SELECTION, TIME],
)
