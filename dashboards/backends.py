"""The Backends board: the gateway's view of its backends, beside vLLM's own metrics."""

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
            "Engines that Prometheus can scrape, by model.",
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
            "Requests that vLLM has no capacity for yet. If it persists, add a replica; KEDA scales on this metric.",
            (f"sum by (model_name) (vllm:num_requests_waiting{{{V}}})", "{{model_name}}"),
            decimals=0,
            steps=above(5, 20),
            graph=True,
        ),
        stat(
            "KV cache in use",
            "Of the fullest engine. Near 100%, vLLM preempts requests and recomputes them.",
            (f"max by (model_name) (vllm:kv_cache_usage_perc{{{V}}})", "{{model_name}}"),
            "percentunit",
            decimals=0,
            steps=above(0.8, 0.95),
            graph=True,
        ),
        stat(
            "Prefix cache hits",
            "Share of the queried prompt tokens, over the selected time range. High if conversations keep their pool.",
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
    "Gateway and vLLM compared",
    [
        lines(
            "First token, p95",
            "The gateway's (from the complete request) beside vLLM's own. The difference is scoring, queueing for a "
            "slot and the network.",
            [
                (_quantile(0.95, "gateway_time_to_first_token_seconds", "pool", G), "gateway: {{pool}}"),
                (_quantile(0.95, "vllm:time_to_first_token_seconds", "model_name", V), "vLLM: {{model_name}}"),
            ],
            "s",
            limit=10,
            alerts=["DepoFirstTokenSlow"],
        ),
        lines(
            "Requests in progress",
            "The gateways' slots in use beside vLLM's running and waiting requests. Much more at vLLM: other clients, "
            "or the learner's shadow calls.",
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
            "Per second: what the gateways' clients received, beside all that vLLM generated.",
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
            "The speed at which a reader sees a stream. It grows with the batch.",
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
            "Waiting in the queue, reading the prompt (prefill), writing the answer (decode).",
            [
                (_quantile(0.95, f"vllm:request_{phase}_time_seconds", "model_name", V), f"{{{{model_name}}}} {phase}")
                for phase in ("queue", "prefill", "decode")
            ],
            "s",
        ),
        lines(
            "Prompt tokens",
            "Read per second.",
            (f"sum by (model_name) (rate(vllm:prompt_tokens_total{{{V}}}[$__rate_interval]))", "{{model_name}}"),
        ),
    ],
)

LOAD = Row(
    "vLLM: load",
    [
        lines(
            "Waiting, by server",
            "If one server is far above the others: the Service distributes connections, not requests.",
            (f"sum by (model_name, instance) (vllm:num_requests_waiting{{{V}}})", "{{model_name}} {{instance}}"),
        ),
        lines(
            "KV cache in use, by server",
            "Above the line, vLLM will soon preempt. Allow fewer sequences (--max-num-seqs), a shorter "
            "--max-model-len, or add a replica.",
            (f"max by (model_name, instance) (vllm:kv_cache_usage_perc{{{V}}})", "{{model_name}} {{instance}}"),
            "percentunit",
            limit=0.95,
            at_most=1,
        ),
        lines(
            "Preemptions",
            "Requests per second that were evicted from the KV cache and recomputed. Persistent values above 0 cost "
            "speed.",
            (
                f"sum by (model_name, instance) (rate(vllm:num_preemptions_total{{{V}}}[$__rate_interval]))",
                "{{model_name}} {{instance}}",
            ),
        ),
    ],
)

ENDS = Row(
    "How requests end",
    [
        lines(
            "The gateway's attempts, by backend",
            "ok; client_error: vLLM's own 4xx; refused, reset, timeout, status_50x: no answer, tried elsewhere; "
            "cancelled: the client disconnected.",
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
            "stop: the model finished. length: cut at max_tokens. abort: the client disconnected.",
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
    "The gateway's view of its backends, beside vLLM's own metrics (vLLM 0.12 or later).",
    [GATEWAY, VLLM],
    [alerts()],
    [NOW, BESIDE, SPEED, LOAD, ENDS],
)
