"""Query -> Decision: which pool serves a request."""

import random

from depo_gateway.gateway import conversations, protocol, routing
from depo_gateway.gateway.protocol import ApiError, Query
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.state import Gateway, Live, Request


async def decide(gateway: Gateway, live: Live, query: Query, key: str, request: Request) -> tuple[Eligible, Decision]:
    """The pool for a query, and the pools that could take it in its stead."""
    pinned = live.names.get(query.model)
    if pinned is not None:
        return Eligible((pinned,)), Decision(pinned, "pinned", estimator=live.scorer.version)
    if query.model != protocol.AUTO and not query.model.startswith(protocol.AUTO + "-"):
        known = ", ".join((protocol.AUTO, *live.config.pools))
        raise ApiError(
            404,
            f"The model {query.model!r} does not exist; this gateway has {known} (GET /v1/models).",
            "model_not_found",
            "model",
        )
    asked = request.accounting.requested_threshold = protocol.wanted_threshold(query.model)
    if query.endpoint == "embeddings":
        raise ApiError(
            400,
            f"Embeddings are not routed; name a pool as 'model': {', '.join(live.config.pools)}.",
            "model_not_routable",
            "model",
        )
    if query.endpoint == "completions" and not query.prompt and query.fields.get("prompt") not in ("", [""]):
        raise ApiError(
            400,
            "Only a 'prompt' of text can be routed; for token ids name a pool as 'model'.",
            "prompt_not_routable",
            "prompt",
        )
    config = live.config
    candidates = routing.eligible(config.pools, query.needs, query.prompt_tokens)
    if not candidates.pools:
        raise ApiError(
            400, f"No pool accepts {' and '.join(sorted(query.needs))}.", "modality_not_accepted", "messages"
        )
    request.phase = "scoring"
    scored = request.notes.scored = await live.scorer.score(query.asked)
    sticky = config.routing.sticky and query.endpoint == "chat"
    served_by = gateway.conversations.find(key, query.messages) if sticky else None
    threshold = gateway.control.threshold if asked is None else asked
    coin = gateway.control.coin(gateway.shares) if asked is None else None
    if scored is None:
        decision = routing.without_scores(
            candidates, config.routing.on_overload, gateway.shares, threshold, random.random()
        )
    else:
        confidence = routing.confidences(scored.quality, config.routing.rule, candidates)
        request.accounting.scored(confidence, candidates, len(config.pools), scored)
        explore, draw = config.routing.explore if served_by is None else 0.0, random.random()
        decision = (
            routing.decide(confidence, candidates, threshold, scored.version, explore, draw)
            if coin is None
            else routing.by_share(confidence, candidates, coin, threshold, scored.version, draw)
        )
    if served_by is not None:
        looping = conversations.in_tool_loop(query.messages)
        decision = routing.keep(decision, served_by, tuple(config.pools), candidates, looping)
    return candidates, decision
