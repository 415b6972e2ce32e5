"""The Learning board: what the learner gathers, what it makes of it, and what of that is served."""

from dashboards.board import GATEWAY, LEARNER, Row, alerts, board, new_version
from dashboards.panels import BAD, GOOD, WARN, above, lines, stat, states, zero

G, L = GATEWAY.these, LEARNER.these

NOW = Row(
    "Now",
    [
        stat(
            "Published last",
            "The checkpoint that `current` names, or the base. Gateways that watch the directory serve it.",
            (f"count by (version) (learner_info{{{L}}})", "{{version}}"),
            names=True,
            width=5,
        ),
        stat(
            "Published",
            "How long ago this learner last published. Long is no fault by itself: only what is better is published.",
            (f"time() - (max(learner_last_publish_timestamp_seconds{{{L}}}) > 0)", "ago"),
            "s",
            no_value="not since it started",
            width=4,
        ),
        stat(
            "Better than a coin by",
            "Mean quality of the router minus that of a coin at equal shares, on the newest labels. Below 0 the "
            "gateways route by share until a better checkpoint is there.",
            (f"min(learner_advantage{{{L}}})", "advantage"),
            "percentunit",
            decimals=1,
            steps=[(None, BAD), (0, GOOD)],
            width=3,
            alerts=["DepoRouterNoBetterThanCoin", "DepoRouterFloor"],
        ),
        stat(
            "Calibration error",
            "The worst of the newest candidate's qualities and of its gain. The gate lets 0.05 above chance pass.",
            (f"max(learner_calibration_error{{{L}}})", "error"),
            decimals=3,
            steps=above(0.05, 0.1),
            width=3,
            no_value="no training yet",
        ),
        stat(
            "Labelled prompts",
            "That the newest training learned from.",
            (f"max(learner_labels_seen{{{L}}})", "labels"),
            decimals=0,
            width=3,
        ),
        stat(
            "Trainings in the time shown",
            "published: better, and served. refused: no better, refusals.jsonl says why; that is the gate at work. "
            "failed: the training broke off, and is tried again.",
            (f"round(sum by (verdict) (increase(learner_refreshes_total{{{L}}}[$__range])))", "{{verdict}}"),
            decimals=0,
            width=6,
            alerts=["DepoLearnerRefreshFailing", "DepoLearnerStalled"],
        ),
    ],
)

LABELS = Row(
    "Labels",
    [
        lines(
            "Labels written",
            "An hour, by the judge they come from.",
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
            "Feedback of clients",
            "Scores stored an hour by the gateways: labels too, without any judge.",
            (
                zero(f'3600 * sum(rate(gateway_feedback_total{{{G},outcome="stored"}}[$__rate_interval]))'),
                "stored",
            ),
            alerts=[],
        ),
        lines(
            "Verdicts",
            "Records judged, an hour. none: the judge had nothing to say (no reference, no valid verdict).",
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
    ],
)

SHADOW = Row(
    "Shadowing: what would the other pools have said?",
    [
        lines(
            "Records",
            "An hour. passed: not of shadow.share. given_up: kept failing while others went well.",
            (
                zero(
                    f"3600 * sum by (outcome) (rate(learner_shadowed_records_total{{{L}}}[$__rate_interval]))",
                    "outcome",
                    "none yet",
                ),
                "{{outcome}}",
            ),
            width=6,
            stacked=True,
        ),
        lines(
            "Calls",
            "Of pools, the judge's too. refused: a 4xx, the record has no label there. failed: no answer.",
            (
                zero(
                    f"sum by (pool, outcome) (rate(learner_shadow_requests_total{{{L}}}[$__rate_interval]))",
                    "outcome",
                    "none yet",
                ),
                "{{pool}} {{outcome}}",
            ),
            "reqps",
            width=6,
            stacked=True,
        ),
        lines(
            "Cost an hour",
            "Of shadowing and judging, in the unit of pools.*.cost, beside what clients' requests cost. "
            "shadow.cost_per_hour is the cap.",
            [
                (f"3600 * sum(rate(learner_shadow_cost_total{{{L}}}[$__rate_interval]))", "shadowing"),
                (f"3600 * sum(rate(gateway_cost_total{{{G}}}[$__rate_interval]))", "clients"),
            ],
            width=6,
        ),
        states(
            "Paused, or without priority",
            "cost: the hour's cap. busy: clients wait at a backend. unreachable: a pool or the judge does not answer. "
            "records: the database does not. priority refused: a backend takes no shadow.priority, and shadow calls "
            "wait in line like clients' own.",
            [
                (
                    zero(f"max by (reason) (learner_shadow_paused{{{L}}})", "reason", "shadowing is off"),
                    "{{reason}}",
                ),
                (zero(f"max(learner_priority_refused{{{L}}})"), "priority refused"),
            ],
            {0: ("no", GOOD), 1: ("yes", WARN)},
            width=6,
            alerts=["DepoShadowingPaused"],
        ),
    ],
)

TRAINING = Row(
    "Training and the gate",
    [
        lines(
            "Trainings an hour",
            "By verdict, counted over the hour before.",
            (f"sum by (verdict) (increase(learner_refreshes_total{{{L}}}[1h]))", "{{verdict}}"),
            stacked=True,
            width=6,
            alerts=["DepoLearnerRefreshFailing"],
        ),
        lines(
            "Length of a training",
            "The mean over the hour before, from its start to its verdict.",
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
            "Of each training's candidate: of a pool's quality, and of the gain. The gate lets 0.05 above chance pass.",
            (f"max by (of) (learner_calibration_error{{{L}}})", "{{of}}"),
            limit=0.05,
            width=6,
        ),
        lines(
            "Better than a coin by",
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
    "Round again: versions in service, and what went wrong",
    [
        lines(
            "Gateways by version",
            "How many replicas serve which checkpoint: after a publication all should change within seconds.",
            (f"count by (version) (gateway_estimator_info{{{G}}})", "{{version}}"),
            stacked=True,
        ),
        lines(
            "Checkpoints found by gateways",
            "Counted over the hour before. refused: damaged, or it scores other pools; the old one stays.",
            (f"sum by (result) (increase(gateway_estimator_loads_total{{{G}}}[1h]))", "{{result}}"),
            alerts=["DepoEstimatorRefused"],
        ),
        lines(
            "Failures that the learner waits out",
            "Counted over the hour before. records: the database. shadow: a pool or the judge. refresh: a training. "
            "disk: --out.",
            (f"sum by (part) (increase(learner_errors_total{{{L}}}[1h]))", "{{part}}"),
            stacked=True,
            alerts=["DepoLearnerDown"],
        ),
    ],
)

BOARD = board(
    "learning",
    "Learning",
    "What the learner gathers, what it makes of it, and what of that is served.",
    [LEARNER, GATEWAY],
    [alerts(), new_version(LEARNER, "learner_info", "Published")],
    [NOW, LABELS, SHADOW, TRAINING, ROUND],
)
