"""POST /v1/feedback: a score for an answer, tied to the request's id and to the key that received it."""

import asyncio
import time

from depo_gateway.estimator.records.store import Feedback, StoreError
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.query import json_object
from depo_gateway.gateway.records import Recorder
from depo_gateway.gateway.state import Gateway

# The record may not be written yet, by this gateway or by another on the same database: batches take 50 ms.
LOOK_AGAIN_SECONDS = (0.1, 0.2, 0.3, 0.4)
RETRY_AFTER = ((b"retry-after", b"5"),)
COMMENT_CHARACTERS = 4096
FIELDS = ("request_id", "score", "comment")


async def store_feedback(gateway: Gateway, key: str, body: bytes) -> str:
    """Stores the feedback and returns the request's id once it is durable.

    Raises:
        ApiError: 400 for a malformed body, 404 where no such answer is on record or nothing is recorded, 503 while the
            database is not available; then nothing is acknowledged.
    """
    outcome = "refused"
    try:
        recorder = gateway.recorder
        if recorder is None:
            raise ApiError(
                404, "This gateway records nothing to score: its config needs a `records` section.", "records_off"
            )
        item = parse_feedback(body, key, time.time())
        outcome = "unavailable"
        if not await _stored(recorder, item):
            outcome = "unknown"
            raise ApiError(
                404,
                f"No answer to the request {item.id!r} is on record for this key; x-request-id of the answer names it.",
                "request_not_found",
                "request_id",
            )
        outcome = "stored"
        return item.id
    except (StoreError, TimeoutError):
        raise ApiError(
            503,
            "The feedback is not stored: the records database is not available. Send it again later.",
            "records_unavailable",
            headers=RETRY_AFTER,
        ) from None
    finally:
        gateway.metrics.feedback.labels(outcome).inc()


def parse_feedback(body: bytes, key: str, now: float) -> Feedback:
    """Bytes -> Feedback of `key` at `now` (Unix seconds).

    Raises:
        ApiError: 400, naming the field.
    """
    fields = json_object(body)
    for name in fields:
        if name not in FIELDS:
            raise _wrong(name, f"{name!r} is not known here; there are {', '.join(FIELDS)}")
    request_id, score, comment = (fields.get(name) for name in FIELDS)
    if not isinstance(request_id, str) or not 0 < len(request_id) <= 128:
        raise _wrong("request_id", "'request_id' must be the x-request-id of an answer")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise _wrong("score", "'score' must be a number from 0 to 1")
    if comment is not None and (not isinstance(comment, str) or len(comment) > COMMENT_CHARACTERS):
        raise _wrong("comment", f"'comment' must be text of at most {COMMENT_CHARACTERS:,} characters")
    return Feedback(request_id, key, float(score), comment or "", now)


async def _stored(recorder: Recorder, item: Feedback) -> bool:
    for seconds in LOOK_AGAIN_SECONDS:
        if await recorder.feedback(item):
            return True
        await asyncio.sleep(seconds)
    return await recorder.feedback(item)


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{message}.", "invalid_feedback", field)
