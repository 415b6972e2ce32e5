"""The Backends board: what the gateway sees of its backends, beside what vLLM says of itself."""

from dashboards.board import GATEWAY, VLLM, Row, alerts, board
from dashboards.panels import above, below, lines, stat, zero

G, V = GATEWAY.these, VLLM.these


def _quantile(part: float, metric: str, by: str, these: str) -> str:
    return f"histogram_quantile({part}, sum by ({by}, le) (rate({metric}_bucket{{{these}}}[$__rate_interval])))"


NOW = Row(
    "Now",
    [
        stat(
            "Backends up",
            "Share of the gateway's backends whose health checks pass, at the replica that sees fewest.",
            (f"min(avg by (job, instance) (gateway_backend_up{{{G}}}))", "up"),
            "percentunit",
            decimals=0,
            steps=below(1, 0.5),
            alerts=["DepoBackendDown", "DepoNoUsableBackend"],
        ),
        stat(
            "vLLM servers",
            "Engines that answer Prometheus, by model.",
            (f"count by (model_name) (vllm:num_requests_running{{{V}}})", "{{model_name}}"),
            decimals=0,
        ),
        stat(
            "Running",
            "Requests in vLLM's batches.",
            (f"sum by (model_name) (vllm:num_requests_running{{{V}}})", "{{model_name}}"),
            decimals=0,
            graph=True,
        ),
        stat(
            "Waiting",
            "Requests that vLLM has no room for yet. What lasts wants another replica; KEDA scales on it.",
            (f"sum by (model_name) (vllm:num_requests_waiting{{{V}}})", "{{model_name}}"),
            decimals=0,
            steps=above(5, 20),
            graph=True,
        ),
        stat(
            "KV cache in use",
            "Of the fullest engine. Near 100% vLLM preempts requests and computes them again.",
            (f"max by (model_name) (vllm:kv_cache_usage_perc{{{V}}})", "{{model_name}}"),
            "percentunit",
            decimals=0,
            steps=above(0.8, 0.95),
            graph=True,
        ),
        stat(
            "Prefix cache hits",
            "Of the prompt tokens asked for, in the time shown. High where conversations keep their pool.",
            (
                f"sum by (model_name) (increase(vllm:prefix_cache_hits_total{{{V}}}[$__range]))"
                f" / sum by (model_name) (increase(vllm:prefix_cache_queries_total{{{V}}}[$__range]))",
                "{{model_name}}",
            ),
            "percentunit",
            decimals=0,
        ),
    ],
)

BESIDE = Row(
    "The same, seen from both sides",
    [
        lines(
            "First token, p95",
            "The gateway's (from the complete request) beside vLLM's own. The distance is scoring, the line for a slot "
            "and the way there.",
            [
                (_quantile(0.95, "gateway_time_to_first_token_seconds", "pool", G), "gateway: {{pool}}"),
                (_quantile(0.95, "vllm:time_to_first_token_seconds", "model_name", V), "vLLM: {{model_name}}"),
            ],
            "s",
            limit=10,
            alerts=["DepoFirstTokenSlow"],
        ),
        lines(
            "Requests in work",
            "The gateways' slots in use beside what vLLM runs and lets wait. Much more at vLLM: other clients, or the "
            "learner's shadow calls.",
            [
                (f"sum by (pool) (gateway_in_flight_requests{{{G}}})", "gateway: {{pool}}"),
                (
                    f"sum by (model_name) (vllm:num_requests_running{{{V}}} + vllm:num_requests_waiting{{{V}}})",
                    "vLLM: {{model_name}}",
                ),
            ],
        ),
        lines(
            "Tokens generated",
            "A second, as the gateways count what their clients got, beside all that vLLM generated.",
            [
                (
                    f'sum by (pool) (rate(gateway_tokens_total{{{G},type="completion"}}[$__rate_interval]))',
                    "gateway: {{pool}}",
                ),
                (
                    f"sum by (model_name) (rate(vllm:generation_tokens_total{{{V}}}[$__rate_interval]))",
                    "vLLM: {{model_name}}",
                ),
            ],
        ),
    ],
)

SPEED = Row(
    "vLLM: speed",
    [
        lines(
            "Between two tokens",
            "What a reader of a stream feels. It grows with the batch.",
            [
                (
                    _quantile(part, "vllm:inter_token_latency_seconds", "model_name", V),
                    f"{{{{model_name}}}} p{part * 100:.0f}",
                )
                for part in (0.5, 0.95)
            ],
            "s",
        ),
        lines(
            "Where a request's time goes, p95",
            "In line, reading the prompt (prefill), writing the answer (decode).",
            [
                (_quantile(0.95, f"vllm:request_{phase}_time_seconds", "model_name", V), f"{{{{model_name}}}} {phase}")
                for phase in ("queue", "prefill", "decode")
            ],
            "s",
        ),
        lines(
            "Prompt tokens",
            "Read a second.",
            (f"sum by (model_name) (rate(vllm:prompt_tokens_total{{{V}}}[$__rate_interval]))", "{{model_name}}"),
        ),
    ],
)

LOAD = Row(
    "vLLM: load",
    [
        lines(
            "Waiting, by server",
            "One server much above the others: the Service spreads connections, not requests.",
            (f"sum by (model_name, instance) (vllm:num_requests_waiting{{{V}}})", "{{model_name}} {{instance}}"),
        ),
        lines(
            "KV cache in use, by server",
            "Above the line vLLM will soon preempt: fewer sequences (--max-num-seqs), a shorter --max-model-len, or "
            "another replica.",
            (f"max by (model_name, instance) (vllm:kv_cache_usage_perc{{{V}}})", "{{model_name}} {{instance}}"),
            "percentunit",
            limit=0.95,
            at_most=1,
        ),
        lines(
            "Preemptions",
            "Requests pushed out of the KV cache and computed again, a second. Anything lasting above 0 costs speed.",
            (
                f"sum by (model_name, instance) (rate(vllm:num_preemptions_total{{{V}}}[$__rate_interval]))",
                "{{model_name}} {{instance}}",
            ),
        ),
    ],
)

ENDS = Row(
    "How exchanges end",
    [
        lines(
            "The gateway's attempts, by backend",
            "ok; client_error: vLLM's own 4xx; refused, reset, timeout, status_50x: no answer, and tried elsewhere; "
            "cancelled: the client hung up.",
            (
                f"sum by (backend, outcome) (rate(gateway_upstream_attempts_total{{{G}}}[$__rate_interval]))",
                "{{backend}} {{outcome}}",
            ),
            "reqps",
            stacked=True,
            width=12,
            alerts=["DepoBackendDown"],
        ),
        lines(
            "vLLM's requests, by how they ended",
            "stop: the model was done. length: cut at max_tokens. abort: the client was gone.",
            (
                zero(
                    f"sum by (model_name, finished_reason) (rate(vllm:request_success_total{{{V}}}[$__rate_interval]))",
                    "finished_reason",
                    "none yet",
                ),
                "{{model_name}} {{finished_reason}}",
            ),
            "reqps",
            stacked=True,
            width=12,
        ),
    ],
)

BOARD = board(
    "backends",
    "Backends",
    "What the gateway sees of its backends, beside what vLLM (0.12 or later) says of itself.",
    [GATEWAY, VLLM],
    [alerts()],
    [NOW, BESIDE, SPEED, LOAD, ENDS],
)
