"""Query -> Decision: which pool serves a request."""

import random
from collections.abc import Mapping

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import conversations, routing
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.model_names import requested_threshold
from depo_gateway.gateway.openai.api import Prompt
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.query import Query
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.scoring import Scored, usual_shares
from depo_gateway.gateway.state import Gateway, Live, RequestState
from depo_gateway.gateway.task_groups import group_of


async def decide(gateway: Gateway, request: RequestState, query: Query, key: str) -> tuple[Eligible, Decision]:
    """The pool for a query, and the pools that could serve it instead.

    Raises:
        ApiError: 404 for an unknown model, 400 for a query that can't be routed or that no pool accepts.
    """
    live, where = request.live, request.live.config.routing.group
    group = group_of(None if where is None else where.from_, key, request.headers, query)
    request.notes.group = request.accounting.group = group
    named = live.names.get(query.model)
    if named is not None:
        return Eligible((named,)), Decision(named, Reason.PINNED, estimator=live.scorer.version)
    request.accounting.requested_threshold = requested_threshold(query.model, live.config.pools)
    prompt, candidates = _routable(live.config, query)
    request.phase = "scoring"
    scored = request.notes.scored = await live.scorer.score(prompt, group)
    sticky = live.config.routing.sticky and (query.messages or query.continued_answer)
    served_by = gateway.conversations.find(key, query.messages, query.continued_answer) if sticky else None
    decision = _choose(gateway, request, candidates, scored, explore=served_by is None)
    if served_by is not None:
        looping = conversations.in_tool_loop(query.messages)
        decision = routing.keep(decision, served_by, tuple(live.config.pools), candidates, looping)
    return candidates, decision


def _routable(config: Config, query: Query) -> tuple[Prompt, Eligible]:
    """The prompt to score, and the pools that can take the query."""
    if query.prompt is None:
        raise query.api.unroutable(tuple(config.pools))
    candidates = routing.eligible(config.pools, query.modalities, query.context_needed)
    if not candidates.pools:
        message = f"No pool accepts {' and '.join(sorted(query.modalities))}."
        raise ApiError(400, message, "modality_not_accepted", query.api.prompt_field)
    return query.prompt, candidates


def _choose(
    gateway: Gateway, request: RequestState, candidates: Eligible, scored: Scored | None, explore: bool
) -> Decision:
    """The pool by the scores; at random where there are none, or where they can't be relied on: labels show them to be
    no better, or the prompt is unlike those of the estimator's fit."""
    rules, requested, draw = request.live.config.routing, request.accounting.requested_threshold, random.random()
    threshold = gateway.control.threshold if requested is None else requested
    if scored is None:
        return routing.without_scores(candidates, rules.on_overload, gateway.shares, threshold, draw)
    confidence = routing.confidences(scored.quality, rules.rule, candidates)
    request.accounting.note_scores(confidence, candidates, len(request.live.config.pools), scored)
    shares = gateway.control.random_shares(gateway.shares) if requested is None else None
    if shares is not None:
        return routing.by_share(confidence, candidates, shares, threshold, scored.version, draw)
    share = rules.explore if explore else 0.0
    if not scored.unfamiliar:
        return routing.by_threshold(confidence, candidates, threshold, scored.version, share, draw)
    if requested in (0.0, 1.0):
        return routing.at_an_end(confidence, candidates, threshold, scored.version, share, draw)
    usual = _shares_of_unfamiliar(gateway, request.live, candidates, requested)
    reason = Reason.UNFAMILIAR
    return routing.by_share(confidence, candidates, usual, threshold, scored.version, draw, reason, share)


def _shares_of_unfamiliar(
    gateway: Gateway, live: Live, candidates: Eligible, requested: float | None
) -> Mapping[str, float]:
    """Each pool's probability for an unfamiliar prompt, by routing.unfamiliar. {}: all are equally likely."""
    rules, pools = live.config.routing, tuple(live.config.pools)
    if rules.unfamiliar in candidates.pools:
        return {rules.unfamiliar: 1.0}
    if rules.unfamiliar == "explore":
        return {}
    asked = {} if requested is None else usual_shares(live.scorer.runtime, pools, rules.rule, requested)
    return asked or gateway.control.shares_without_scores(gateway.shares)
