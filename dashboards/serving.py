"""The Serving board: availability, latency, and failures by place."""

from dashboards.board import GATEWAY, LEARNER, Row, alerts, board, new_version
from dashboards.panels import BAD, GOOD, WARN, above, below, lines, stat, states, zero

G = GATEWAY.these
REQUESTS = "gateway:requests:rate5m"
FIRING = 'ALERTS{{alertname=~"Depo.+",alertstate="firing",{}}}'

NOW = Row(
    "Now",
    [
        stat(
            "Alerts",
            "Firing for the selected gateways and learners.",
            (zero(f"count({FIRING.format(G)} or {FIRING.format(LEARNER.these)})"), "firing"),
            steps=above(1, None),
            decimals=0,
            width=2,
        ),
        stat(
            "Replicas",
            "Gateways that Prometheus can scrape.",
            (f"count(gateway_build_info{{{G}}})", "replicas"),
            decimals=0,
            width=2,
            alerts=["DepoGatewayAbsent", "DepoGatewayReplicaDown"],
        ),
        stat(
            "Requests",
            "Per second, over 5 minutes.",
            (f"sum({REQUESTS}{{{G}}})", "requests"),
            "reqps",
            graph=True,
            no_value="no traffic",
        ),
        stat(
            "Errors",
            "Share of answers with 5xx, over 5 minutes.",
            (f'sum({REQUESTS}{{{G},code=~"5.."}} or 0 * {REQUESTS}{{{G}}}) / (sum({REQUESTS}{{{G}}}) > 0)', "errors"),
            "percentunit",
            decimals=2,
            steps=above(0.01, 0.05),
            graph=True,
            no_value="no traffic",
            alerts=["DepoErrorRateHigh", "DepoErrorRateElevated"],
        ),
        stat(
            "Request, p95",
            "From the first byte of a request to the last of its answer, in the slowest pool.",
            (f'max(gateway:request_duration:p95_5m{{{G},pool!="none"}})', "p95"),
            "s",
            graph=True,
            no_value="no traffic",
        ),
        stat(
            "First token, p95",
            "Streams: from the complete request to the first byte, in the slowest pool.",
            (f"max(gateway:time_to_first_token:p95_5m{{{G}}})", "p95"),
            "s",
            steps=above(5, 10),
            graph=True,
            no_value="no streams",
            alerts=["DepoFirstTokenSlow"],
        ),
        stat(
            "Backends up",
            "Share of the backends whose health checks pass, at the replica that sees the fewest.",
            (f"min(avg by (job, instance) (gateway_backend_up{{{G}}}))", "up"),
            "percentunit",
            decimals=0,
            steps=below(1, 0.5),
            alerts=["DepoBackendDown", "DepoNoUsableBackend"],
        ),
    ],
)

TRAFFIC = Row(
    "Traffic",
    [
        lines(
            "Requests by pool",
            "`none`: answered without a pool (refused, or no backend was usable).",
            (f"sum by (pool) ({REQUESTS}{{{G}}})", "{{pool}}"),
            "reqps",
            stacked=True,
        ),
        lines(
            "Requests by status",
            "499: the client disconnected. 429: a key's limits. 503: no backend could take it.",
            (f"sum by (code) ({REQUESTS}{{{G}}})", "{{code}}"),
            "reqps",
            stacked=True,
            alerts=["DepoErrorRateHigh"],
        ),
        lines(
            "Tokens",
            "As counted by the backends.",
            (
                f"sum by (pool, type) (rate(gateway_tokens_total{{{G}}}[$__rate_interval]))",
                "{{pool}} {{type}}",
            ),
            "suffix: tokens/s",
            stacked=True,
        ),
    ],
)

LATENCY = Row(
    "Latency (the slowest of the selected gateways)",
    [
        lines(
            "Request",
            "From the first byte of a request to the last of its answer: mostly due to the length of the answer.",
            [
                (f'max by (pool) (gateway:request_duration:{part}_5m{{{G},pool!="none"}})', f"{{{{pool}}}} {part}")
                for part in ("p50", "p95", "p99")
            ],
            "s",
        ),
        lines(
            "First token",
            "Streams: from the complete request to the first byte. Compare with the Backends board: time that vLLM "
            "does not report was spent in the gateway's queue or on the network.",
            [
                (f"max by (pool) (gateway:time_to_first_token:{part}_5m{{{G}}})", f"{{{{pool}}}} {part}")
                for part in ("p50", "p95")
            ],
            "s",
            limit=10,
            alerts=["DepoFirstTokenSlow"],
        ),
        lines(
            "The gateway's own time",
            "From the complete request to sending it to a backend, without queueing: parsing, scoring, deciding.",
            [(f"max(gateway:overhead:{part}_5m{{{G}}})", part) for part in ("p50", "p99")],
            "s",
            limit=0.25,
            alerts=["DepoOverheadHigh"],
        ),
    ],
)

CAPACITY = Row(
    "Capacity",
    [
        lines(
            "In flight",
            "Requests that occupy a slot, of pools.*.max_in_flight per replica.",
            (f"sum by (pool) (gateway_in_flight_requests{{{G}}})", "{{pool}}"),
        ),
        lines(
            "Wait for a slot, p95",
            "If it grows, raise max_in_flight or add backends. After limits.queue_timeout_s another pool serves, or "
            "none does (503).",
            (
                f"histogram_quantile(0.95, sum by (pool, le) "
                f"(rate(gateway_queue_wait_seconds_bucket{{{G}}}[$__rate_interval])))",
                "{{pool}}",
            ),
            "s",
        ),
        states(
            "Backends",
            "Health checks and circuits, at the replica with the worst view. Open: three failures in a row; "
            "it is tried again after 2 s, doubling up to 30 s.",
            (
                f'max by (backend) (label_replace(3 * (1 - gateway_backend_up{{{G}}}), "of", "health", "", "")'
                f' or label_replace(gateway_circuit_state{{{G}}}, "of", "circuit", "", ""))',
                "{{backend}}",
            ),
            {0: ("up", GOOD), 1: ("half open", WARN), 2: ("circuit open", WARN), 3: ("down", BAD)},
            width=8,
            alerts=["DepoBackendDown", "DepoNoUsableBackend"],
        ),
    ],
)

FAILURES = Row(
    "Failures",
    [
        lines(
            "Errors by status and pool",
            "Answers to clients: 4xx (except 429) are the clients' errors, 5xx the gateway's or the backends'.",
            (
                zero(
                    f"sum by (pool, code) "
                    f'(rate(gateway_requests_total{{{G},code=~"[45]..",code!="499"}}[$__rate_interval]))',
                    "code",
                    "none yet",
                ),
                "{{pool}} {{code}}",
            ),
            "reqps",
            stacked=True,
            alerts=["DepoErrorRateHigh", "DepoErrorRateElevated"],
        ),
        lines(
            "Failed attempts, by backend",
            "Attempts without an answer from the backend. Retries and other pools compensate for most of them.",
            (
                zero(
                    f"sum by (backend, outcome) (rate(gateway_upstream_attempts_total"
                    f'{{{G},outcome!~"ok|client_error|cancelled"}}[$__rate_interval]))',
                    "outcome",
                    "none yet",
                ),
                "{{backend}} {{outcome}}",
            ),
            "reqps",
            stacked=True,
            alerts=["DepoBackendDown"],
        ),
        lines(
            "Second attempts",
            "By the failure of the first attempt. Limited by the retries section of the config.",
            (
                zero(f"sum by (reason) (rate(gateway_retries_total{{{G}}}[$__rate_interval]))", "reason", "none yet"),
                "{{reason}}",
            ),
            "reqps",
            stacked=True,
        ),
        lines(
            "Fallbacks",
            "Requests that another pool than the chosen one served, by reason.",
            (
                zero(
                    f"sum by (from_pool, to_pool, reason) (rate(gateway_fallbacks_total{{{G}}}[$__rate_interval]))",
                    "reason",
                    "none yet",
                ),
                "{{from_pool}} → {{to_pool}}: {{reason}}",
            ),
            "reqps",
            stacked=True,
            width=12,
            alerts=["DepoFallbackRatioHigh"],
        ),
        lines(
            "Client disconnects",
            "By the phase of the request. Many in `waiting` or `queue`: answers are too slow.",
            (
                zero(
                    f"sum by (phase) (rate(gateway_client_disconnects_total{{{G}}}[$__rate_interval]))",
                    "phase",
                    "none yet",
                ),
                "{{phase}}",
            ),
            "reqps",
            stacked=True,
            width=12,
        ),
    ],
)

UPKEEP = Row(
    "Records and versions",
    [
        lines(
            "Records",
            "written; dropped: the queue was full, or the shutdown timed out; rejected: the database does not accept "
            "the record. `tries failed`: the database did not answer.",
            [
                (f"sum by (outcome) (rate(gateway_records_total{{{G}}}[$__rate_interval]))", "{{outcome}}"),
                (f"sum(rate(gateway_records_failures_total{{{G}}}[$__rate_interval]))", "tries failed"),
            ],
            "ops",
            alerts=["DepoRecordsDropped", "DepoRecordsFailing"],
        ),
        lines(
            "Records waiting",
            "Not yet in the database; above 10,000, new ones are dropped.",
            (f"max by (instance) (gateway_records_waiting{{{G}}})", "{{instance}}"),
            limit=10_000,
            alerts=["DepoRecordsFailing"],
        ),
        stat(
            "Config reloads in the last hour",
            "After a refused reload the old config stays in force; a restart with the new file would fail.",
            (f"round(sum by (result) (increase(gateway_config_reloads_total{{{G}}}[1h])))", "{{result}}"),
            decimals=0,
            alerts=["DepoConfigReloadFailed"],
        ),
        stat(
            "Versions",
            "Replicas by the gateway's version.",
            (f"count by (version) (gateway_build_info{{{G}}})", "{{version}}"),
            names=True,
        ),
    ],
)

REPLICAS = Row(
    "Replicas compared",
    [
        lines(
            "Requests",
            "If one is far below the others, it gets no traffic: a stuck endpoint, or clients that keep their "
            "connections.",
            (f"sum by (instance) (rate(gateway_requests_total{{{G}}}[$__rate_interval]))", "{{instance}}"),
            "reqps",
        ),
        lines(
            "Errors",
            "Answers with 5xx.",
            (
                f'sum by (instance) (rate(gateway_requests_total{{{G},code=~"5.."}}[$__rate_interval]))'
                f" or 0 * sum by (instance) (rate(gateway_requests_total{{{G}}}[$__rate_interval]))",
                "{{instance}}",
            ),
            "reqps",
            alerts=["DepoErrorRateHigh"],
        ),
        lines(
            "The gateway's own time, p99",
            "If one is far above the others, it has too little CPU.",
            (
                f"histogram_quantile(0.99, sum by (instance, le) "
                f"(rate(gateway_overhead_seconds_bucket{{{G}}}[$__rate_interval])))",
                "{{instance}}",
            ),
            "s",
            limit=0.25,
            alerts=["DepoOverheadHigh"],
        ),
    ],
    closed=True,
)

BOARD = board(
    "serving",
    "Serving",
    "Availability, latency, and failures by place. Look here first when paged.",
    [GATEWAY, LEARNER],
    [alerts(), new_version(GATEWAY, "gateway_build_info", "New gateway version")],
    [NOW, TRAFFIC, LATENCY, CAPACITY, FAILURES, UPKEEP, REPLICAS],
)
