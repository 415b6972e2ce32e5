"""The Routing board: where requests go, what that saves, and whether the scores are reliable."""

from dashboards.board import GATEWAY, LEARNER, Row, alerts, board, new_version
from dashboards.panels import BAD, GOOD, above, buckets, lines, spectrum, stat, zero

G, L = GATEWAY.these, LEARNER.these
DECISIONS = f"rate(gateway_decisions_total{{{G}}}[$__rate_interval])"

NOW = Row(
    "Now",
    [
        stat(
            "Share by pool",
            "Of the requests that a backend answered in the last 5 minutes, for any reason.",
            (
                f"sum by (pool) (rate(gateway_decisions_total{{{G}}}[5m]))"
                f" / on () group_left () sum(rate(gateway_decisions_total{{{G}}}[5m]))",
                "{{pool}}",
            ),
            "percentunit",
            decimals=0,
            width=4,
            no_value="no traffic",
            alerts=["DepoRoutingNearConstant"],
        ),
        stat(
            "Cost saved",
            "1 minus the cost of the tokens in the time range over their cost in the most expensive pool.",
            (
                f"1 - sum(increase(gateway_cost_total{{{G}}}[$__range]))"
                f" / sum(increase(gateway_cost_all_large_total{{{G}}}[$__range]))",
                "saved",
            ),
            "percentunit",
            decimals=1,
            width=3,
            no_value="no traffic",
        ),
        stat(
            "Threshold",
            "The cheapest pool whose confidence reaches it serves. With routing.target it is adjusted automatically. "
            "Mean of all replicas.",
            (f"avg(gateway_threshold{{{G}}})", "threshold"),
            decimals=3,
            width=3,
            graph=True,
        ),
        stat(
            "Scores in use",
            "At random: labels show that the estimator is no better than random routing, and requests are distributed "
            "at random, by share, until it is refreshed.",
            (f"max(gateway_router_floor{{{G}}})", "floor"),
            texts={0: ("yes", GOOD), 1: ("no: random", BAD)},
            width=2,
            alerts=["DepoRouterFloor"],
        ),
        stat(
            "Score drift",
            "Kolmogorov-Smirnov distance of the last 2,000 confidences from the calibration's; 0.03 is chance. Above "
            "0.2 the traffic has changed: refresh the checkpoint. n/a before 200 requests, and if the checkpoint has "
            "no curve for these pools.",
            (f"max(gateway_score_drift{{{G}}})", "drift"),
            decimals=2,
            steps=above(0.1, 0.2),
            width=3,
            alerts=["DepoScoreDrift"],
        ),
        stat(
            "Unfamiliar prompts",
            "Share of the routed requests of the last hour whose prompt is unlike those that the estimator was fitted "
            "on: routing.unfamiliar decides these, not scores. If it is high, fit a checkpoint on such prompts.",
            (
                f"sum(increase(gateway_unfamiliar_total{{{G}}}[1h]))"
                f' / sum(increase(gateway_decisions_total{{{G},reason!="pinned"}}[1h]))',
                "unfamiliar",
            ),
            "percentunit",
            decimals=0,
            steps=above(0.1, 0.5),
            width=3,
            no_value="no traffic",
            alerts=["DepoUnfamiliarTraffic"],
        ),
        stat(
            "Better than random by",
            "Mean quality of the router minus that of random routing with the same shares, on the newest labels, as "
            "the learner reports it. Below 0 the scores do harm.",
            (f"min(learner_advantage{{{L}}})", "advantage"),
            "percentunit",
            decimals=1,
            steps=[(None, BAD), (0, GOOD)],
            width=3,
            no_value="no labels",
            alerts=["DepoRouterNoBetterThanCoin"],
        ),
        stat(
            "Estimator in service",
            "The loaded checkpoint; two while replicas switch to a new one.",
            (f"count by (version) (gateway_estimator_info{{{G}}})", "{{version}}"),
            names=True,
            width=3,
            alerts=["DepoEstimatorRefused"],
        ),
    ],
)

WHERE = Row(
    "Where requests go, and why",
    [
        lines(
            "Share by pool, and the target",
            "Shares of the answered requests. `target, realised` is the share or cost that routing.target bounds, over "
            "the last 2,000 routed requests of a replica, without pinned ones; it should stay within 2 points of "
            "`target, wanted`. Both are absent without a target.",
            [
                (f"sum by (pool) ({DECISIONS}) / on () group_left () sum({DECISIONS})", "{{pool}}"),
                (f"avg(gateway_target_share{{{G}}})", "target, realised"),
                (f"avg(gateway_target_wanted{{{G}}})", "target, wanted"),
            ],
            "percentunit",
            at_most=1,
            alerts=["DepoTargetMissed", "DepoRoutingNearConstant"],
        ),
        lines(
            "Reasons",
            "confident: the cheapest pool is good enough. unsure: a more expensive one was needed. pinned: the client "
            "named it. sticky: the conversation keeps its pool. explore: chosen at random. unfamiliar: the prompt is "
            "unlike what the estimator was fitted on. context, accepts: no other pool can take it. overload: it was "
            "not scored in time. fallback: the chosen pool failed. budget: the key's share is used up.",
            (f"sum by (reason) ({DECISIONS})", "{{reason}}"),
            "reqps",
            stacked=True,
            alerts=["DepoFallbackRatioHigh"],
        ),
        lines(
            "Cost per hour",
            "In the unit of pools.*.cost. The line is the cost of the same tokens in the most expensive pool; the "
            "difference is what routing saves.",
            [
                (f"3600 * sum by (pool) (rate(gateway_cost_total{{{G}}}[$__rate_interval]))", "{{pool}}"),
                (
                    f"3600 * sum(rate(gateway_cost_all_large_total{{{G}}}[$__rate_interval]))",
                    "all in the last pool",
                ),
            ],
        ),
    ],
)

CONFIDENCE = Row(
    "Confidence",
    [
        spectrum(
            "Confidence over time",
            "Of the cheapest eligible pool: how little is lost by serving from it. A single narrow band means that the "
            "scores do not distinguish prompts.",
            f"sum by (le) (rate(gateway_confidence_bucket{{{G}}}[$__rate_interval]))",
            width=8,
            alerts=["DepoConfidenceNearConstant"],
        ),
        buckets(
            "Confidence in the time range",
            "Requests by confidence (a bar's name is its upper end). Requests at or above the threshold stay in the "
            "cheapest pool; if many are close to it, a small change of the threshold moves much traffic.",
            f"sum by (le) (increase(gateway_confidence_bucket{{{G}}}[$__range]))",
            width=8,
        ),
        lines(
            "Threshold and confidences",
            "The threshold, and the confidences below which 10%, 50% and 90% of the requests are.",
            [
                (f"avg(gateway_threshold{{{G}}})", "threshold"),
                *(
                    (
                        f"histogram_quantile({part}, sum by (le) "
                        f"(rate(gateway_confidence_bucket{{{G}}}[$__rate_interval])))",
                        f"{part:.0%} below",
                    )
                    for part in (0.1, 0.5, 0.9)
                ),
            ],
            at_most=1,
        ),
    ],
)

ESTIMATOR = Row(
    "Estimator",
    [
        lines(
            "How prompts were scored",
            "full: in time. cached: seen before. deadline, queue, error: the cheap stage answered, or "
            "routing.on_overload decided; if it persists, give the gateway more CPU or increase estimator.deadline_ms.",
            (
                f"sum by (outcome) (rate(gateway_estimator_outcomes_total{{{G}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
            "reqps",
            stacked=True,
            alerts=["DepoEstimatorFallbackHigh"],
        ),
        lines(
            "Scoring time",
            "By stage, with waiting. The 99th percentile of `full` is limited by estimator.deadline_ms.",
            [
                (
                    f"histogram_quantile({part}, sum by (stage, le) "
                    f"(rate(gateway_estimator_duration_seconds_bucket{{{G}}}[$__rate_interval])))",
                    f"{{{{stage}}}} p{part * 100:.0f}",
                )
                for part in (0.5, 0.99)
            ],
            "s",
        ),
        lines(
            "Score drift",
            "Distance of recent confidences from the calibration's, by replica; above the line the traffic has "
            "changed. Absent before 200 requests, and if the checkpoint has no curve for these pools.",
            (f"gateway_score_drift{{{G}}}", "{{instance}}"),
            limit=0.2,
            at_most=1,
            alerts=["DepoScoreDrift"],
        ),
    ],
)

QUALITY = Row(
    "Quality (with labels)",
    [
        lines(
            "Better than random by",
            "At each training of the learner: mean quality of the router minus that of random routing at equal shares. "
            "Empty without a learner, or before its first training.",
            (f"learner_advantage{{{L}}}", "{{job}}"),
            "percentunit",
            limit=0,
            at_least=None,
            alerts=["DepoRouterNoBetterThanCoin"],
        ),
        lines(
            "Calibration error",
            "Of the newest training's candidate: difference of predicted qualities from labels. The gate allows 0.05 "
            "above chance.",
            (f"max by (of) (learner_calibration_error{{{L}}})", "{{of}}"),
            limit=0.05,
        ),
        lines(
            "Feedback",
            "Calls of /v1/feedback. unavailable: the records database did not answer, and the call got an error.",
            (
                zero(
                    f"sum by (outcome) (rate(gateway_feedback_total{{{G}}}[$__rate_interval]))", "outcome", "none yet"
                ),
                "{{outcome}}",
            ),
            "reqps",
            stacked=True,
        ),
    ],
)

CANDIDATE = Row(
    "Candidate (estimator.candidate)",
    [
        lines(
            "Agreement",
            "How often the candidate and the checkpoint in service decide alike. A low value alone is not bad: see "
            "where the candidate would send requests.",
            (
                f'sum(rate(gateway_candidate_agreement_total{{{G},agrees="yes"}}[$__rate_interval]))'
                f" / sum(rate(gateway_candidate_agreement_total{{{G}}}[$__rate_interval]))",
                "agrees",
            ),
            "percentunit",
            at_most=1,
        ),
        lines(
            "Its shares",
            "The shares of the candidate's decisions (`would`) beside those of all decisions (`did`).",
            [
                (
                    f"sum by (pool) (rate(gateway_candidate_decisions_total{{{G}}}[$__rate_interval]))"
                    f" / on () group_left () sum(rate(gateway_candidate_decisions_total{{{G}}}[$__rate_interval]))",
                    "{{pool}}, would",
                ),
                (f"sum by (pool) ({DECISIONS}) / on () group_left () sum({DECISIONS})", "{{pool}}, did"),
            ],
            "percentunit",
            at_most=1,
        ),
        lines(
            "Prompts",
            "busy: left out because the candidate was still scoring others. unfamiliar: unlike what the candidate was "
            "fitted on; its scores would not decide.",
            (
                f"sum by (outcome) (rate(gateway_candidate_outcomes_total{{{G}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
            "reqps",
            stacked=True,
        ),
        lines(
            "Its confidence",
            "Median for the cheapest eligible pool: the candidate's beside that in service.",
            [
                (
                    f"histogram_quantile(0.5, sum by (le) (rate({name}_bucket{{{G}}}[$__rate_interval])))",
                    title,
                )
                for name, title in (
                    ("gateway_candidate_confidence", "candidate"),
                    ("gateway_confidence", "in service"),
                )
            ],
            at_most=1,
        ),
        stat(
            "Candidate",
            "The loaded one, and how often one was applied or refused in the time range.",
            [
                (f"count by (version) (gateway_candidate_info{{{G}}})", "{{version}}"),
                (
                    f"round(sum by (result) (increase(gateway_candidate_loads_total{{{G}}}[$__range])))",
                    "{{result}}",
                ),
            ],
            width=8,
        ),
    ],
    closed=True,
)

KEYS = Row(
    "Keys with a large share (auth.keys[].large_share)",
    [
        lines(
            "Calls of the last pool left",
            "Each key's remaining calls, 10 at most, at the replica with the fewest. Below 1, its requests go to "
            "cheaper pools (budget), and requests that pin the last pool get 429.",
            (f"min by (key) (gateway_key_large_share_left{{{G}}})", "{{key}}"),
            limit=1,
            at_most=10,
            width=12,
            alerts=["DepoKeyLargeShareSpent"],
        ),
        lines(
            "Routed down, and refused",
            "Decisions for a cheaper pool because the key's share was used up, and all answers with 429 (for that, or "
            "for requests_per_minute).",
            [
                (zero(f'sum(rate(gateway_decisions_total{{{G},reason="budget"}}[$__rate_interval]))'), "budget"),
                (zero(f'sum(rate(gateway_requests_total{{{G},code="429"}}[$__rate_interval]))'), "429"),
            ],
            "reqps",
            width=12,
        ),
    ],
    closed=True,
)

COMPARED = Row(
    "Gateways compared",
    [
        lines(
            "Share by pool",
            "Of each gateway, over 5 minutes.",
            (f"gateway:pool_share:ratio_rate5m{{{G}}}", "{{job}} {{pool}}"),
            "percentunit",
            at_most=1,
        ),
        lines(
            "Cost saved",
            "Of each gateway, over the last hour.",
            (f"gateway:cost_saved:ratio_rate1h{{{G}}}", "{{job}}"),
            "percentunit",
            at_least=None,
        ),
        lines(
            "Prompts not scored in time",
            "Of those that were not in the cache, over 5 minutes.",
            (f"gateway:estimator_fallback:ratio_rate5m{{{G}}}", "{{job}}"),
            "percentunit",
            limit=0.1,
            alerts=["DepoEstimatorFallbackHigh"],
        ),
    ],
    closed=True,
)

BOARD = board(
    "routing",
    "Routing",
    "Where requests go, what that saves, and whether the scores are reliable.",
    [GATEWAY, LEARNER],
    [alerts(), new_version(GATEWAY, "gateway_estimator_info", "New estimator")],
    [NOW, WHERE, CONFIDENCE, ESTIMATOR, QUALITY, CANDIDATE, KEYS, COMPARED],
)
