"""The Learning board: the learner's labels, its trainings, and the versions in service."""

from dashboards.board import GATEWAY, LEARNER, Row, alerts, board, new_version
from dashboards.panels import BAD, GOOD, WARN, above, lines, stat, states, zero

G, L = GATEWAY.these, LEARNER.these

NOW = Row(
    "Now",
    [
        stat(
            "Current version",
            "The checkpoint that `current` names, or the base. Gateways that watch the directory serve it.",
            (f"count by (version) (learner_info{{{L}}})", "{{version}}"),
            names=True,
            width=5,
        ),
        stat(
            "Published",
            "Time since this learner last published. A long time is no fault: only better checkpoints are published.",
            (f"time() - (max(learner_last_publish_timestamp_seconds{{{L}}}) > 0)", "ago"),
            "s",
            no_value="not since it started",
            width=4,
        ),
        stat(
            "Better than random by",
            "Mean quality of the router minus that of random routing at equal shares, on the newest labels. Below 0, "
            "the gateways route at random until a better checkpoint is published.",
            (f"min(learner_advantage{{{L}}})", "advantage"),
            "percentunit",
            decimals=1,
            steps=[(None, BAD), (0, GOOD)],
            width=3,
            alerts=["DepoRouterNoBetterThanCoin", "DepoRouterFloor"],
        ),
        stat(
            "Calibration error",
            "The largest error of the newest candidate's qualities and gain. The gate allows 0.05 above chance.",
            (f"max(learner_calibration_error{{{L}}})", "error"),
            decimals=3,
            steps=above(0.05, 0.1),
            width=3,
            no_value="no training yet",
        ),
        stat(
            "Labelled prompts",
            "Used by the newest training.",
            (f"max(learner_labels_seen{{{L}}})", "labels"),
            decimals=0,
            width=3,
        ),
        stat(
            "Trainings in the time range",
            "published: better, and served. held: it would raise the cost and waits for its owner. "
            "refused: not better, see refusals.jsonl; this is normal. failed: the training ended with an error and "
            "will be retried.",
            (f"round(sum by (verdict) (increase(learner_refreshes_total{{{L}}}[$__range])))", "{{verdict}}"),
            decimals=0,
            width=4,
            alerts=["DepoLearnerRefreshFailing", "DepoLearnerStalled"],
        ),
        stat(
            "Held back",
            "A checkpoint that would raise the cost by more than gate.max_cost_increase. "
            "`depo-train accept` publishes it.",
            (f"max(learner_publish_held{{{L}}})", "held"),
            texts={0: ("no", GOOD), 1: ("yes", WARN)},
            width=2,
            alerts=["DepoPublishHeld"],
        ),
    ],
)

LABELS = Row(
    "Labels",
    [
        lines(
            "Labels written",
            "Per hour, by the judge that wrote them.",
            (
                zero(
                    f"3600 * sum by (source) (rate(learner_labels_total{{{L}}}[$__rate_interval]))",
                    "source",
                    "none yet",
                ),
                "{{source}}",
            ),
            stacked=True,
            alerts=["DepoLearnerStalled"],
        ),
        lines(
            "Feedback from clients",
            "Scores per hour that the gateways stored: labels that need no judge.",
            (
                zero(f'3600 * sum(rate(gateway_feedback_total{{{G},outcome="stored"}}[$__rate_interval]))'),
                "stored",
            ),
            alerts=[],
        ),
        lines(
            "Verdicts",
            "Records judged per hour. none: no verdict (no reference, or an invalid one).",
            (
                zero(
                    f"3600 * sum by (outcome) (rate(learner_verdicts_total{{{L}}}[$__rate_interval]))",
                    "outcome",
                    "nothing yet",
                ),
                "{{outcome}}",
            ),
            stacked=True,
        ),
        lines(
            "Order effects of a judging model",
            "Pairs per hour that it graded in both orders. first, second: the winner depended on the position; where "
            "these are a third of all, the judge is too weak.",
            (
                zero(
                    f"3600 * sum by (favoured) (rate(learner_comparisons_total{{{L}}}[$__rate_interval]))",
                    "favoured",
                    "nothing yet",
                ),
                "{{favoured}}",
            ),
            stacked=True,
        ),
    ],
)

SHADOW = Row(
    "Shadowing: asking the other pools",
    [
        lines(
            "Records",
            "Per hour. passed: not selected by shadow.share. given_up: failed repeatedly while others succeeded.",
            (
                zero(
                    f"3600 * sum by (outcome) (rate(learner_shadowed_records_total{{{L}}}[$__rate_interval]))",
                    "outcome",
                    "none yet",
                ),
                "{{outcome}}",
            ),
            width=4,
            stacked=True,
        ),
        lines(
            "Calls",
            "To pools, including the judge. refused: a 4xx, no label for that record. failed: no answer.",
            (
                zero(
                    f"sum by (pool, outcome) (rate(learner_shadow_requests_total{{{L}}}[$__rate_interval]))",
                    "outcome",
                    "none yet",
                ),
                "{{pool}} {{outcome}}",
            ),
            "reqps",
            width=5,
            stacked=True,
        ),
        lines(
            "Cost per hour",
            "Of shadowing and judging, in the unit of pools.*.cost, beside the cost of clients' requests. "
            "shadow.cost_per_hour caps it; shadow.tokens_per_day, cost_per_day and records_per_day cap the day.",
            [
                (f"3600 * sum(rate(learner_shadow_cost_total{{{L}}}[$__rate_interval]))", "shadowing"),
                (f"3600 * sum(rate(gateway_cost_total{{{G}}}[$__rate_interval]))", "clients"),
            ],
            width=5,
        ),
        lines(
            "Tokens",
            "Of shadowing and judging: an hour, and since midnight UTC. shadow.tokens_per_day is the day's cap.",
            [
                (f"3600 * sum(rate(learner_shadow_tokens_total{{{L}}}[$__rate_interval]))", "an hour"),
                (f'sum(learner_spent_today{{{L},unit="tokens"}})', "today"),
            ],
            width=5,
        ),
        states(
            "Paused, or without priority",
            "cost: the hourly cap. day: a daily cap. "
            "busy: clients wait at a backend. unreachable: a pool or the judge does not answer. "
            "records: the database does not. priority refused: a backend does not accept shadow.priority, and shadow "
            "calls queue like clients' requests.",
            [
                (
                    zero(f"max by (reason) (learner_shadow_paused{{{L}}})", "reason", "shadowing is off"),
                    "{{reason}}",
                ),
                (zero(f"max(learner_priority_refused{{{L}}})"), "priority refused"),
            ],
            {0: ("no", GOOD), 1: ("yes", WARN)},
            width=5,
            alerts=["DepoShadowingPaused"],
        ),
    ],
)

TRAINING = Row(
    "Training and the gate",
    [
        lines(
            "Trainings per hour",
            "By verdict, over the last hour.",
            (f"sum by (verdict) (increase(learner_refreshes_total{{{L}}}[1h]))", "{{verdict}}"),
            stacked=True,
            width=6,
            alerts=["DepoLearnerRefreshFailing"],
        ),
        lines(
            "Duration of a training",
            "Mean over the last hour, from start to verdict.",
            (
                f"sum(increase(learner_refresh_duration_seconds_sum{{{L}}}[1h]))"
                f" / sum(increase(learner_refresh_duration_seconds_count{{{L}}}[1h]))",
                "mean",
            ),
            "s",
            width=6,
        ),
        lines(
            "Calibration error",
            "Of each training's candidate: of a pool's quality, and of the gain. The gate allows 0.05 above chance.",
            (f"max by (of) (learner_calibration_error{{{L}}})", "{{of}}"),
            limit=0.05,
            width=6,
        ),
        lines(
            "Better than random by",
            "At each training, on the newest labels.",
            (f"learner_advantage{{{L}}}", "{{job}}"),
            "percentunit",
            limit=0,
            at_least=None,
            width=6,
            alerts=["DepoRouterNoBetterThanCoin"],
        ),
    ],
)

ROUND = Row(
    "Versions in service, and failures",
    [
        lines(
            "Gateways by version",
            "Replicas by checkpoint: after a publication all should change within seconds.",
            (f"count by (version) (gateway_estimator_info{{{G}}})", "{{version}}"),
            stacked=True,
            width=6,
        ),
        lines(
            "Change at publication",
            "By how much publishing the checkpoint in service changed the large share, and the cost relative to "
            "all-large's, as the learner measured both. No line: it was not published by a learner, or the change was "
            "unknown. held: of the checkpoint that waits for its owner.",
            [
                (f"max(gateway_publish_share_change{{{G}}})", "large share"),
                (f"max(gateway_publish_cost_change{{{G}}})", "cost"),
                (f"max(learner_publish_held_share_change{{{L}}})", "held: large share"),
                (f"max(learner_publish_held_cost_change{{{L}}})", "held: cost"),
            ],
            "percentunit",
            at_least=None,
            width=6,
            alerts=["DepoPublishHeld"],
        ),
        lines(
            "Checkpoints found by gateways",
            "Over the last hour. refused: damaged, or for other pools; the old one stays in service.",
            (f"sum by (result) (increase(gateway_estimator_loads_total{{{G}}}[1h]))", "{{result}}"),
            width=6,
            alerts=["DepoEstimatorRefused"],
        ),
        lines(
            "Failures that the learner retries",
            "Over the last hour. records: the database. shadow: a pool or the judge. refresh: a training. disk: --out.",
            (f"sum by (part) (increase(learner_errors_total{{{L}}}[1h]))", "{{part}}"),
            width=6,
            stacked=True,
            alerts=["DepoLearnerDown"],
        ),
    ],
)

BOARD = board(
    "learning",
    "Learning",
    "The learner's labels, its trainings, and the versions in service.",
    [LEARNER, GATEWAY],
    [alerts(), new_version(LEARNER, "learner_info", "Published")],
    [NOW, LABELS, SHADOW, TRAINING, ROUND],
)
