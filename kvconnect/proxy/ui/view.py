"""What `/ui` shows: the data that its page draws, and requests' lives in that shape.

Has nothing of what clients said or were answered: no headers, no bodies.
"""

from collections.abc import Iterable

import msgspec

from kvconnect.proxy.engines.pool import EngineState
from kvconnect.proxy.requests.life import RequestLife


class PhaseBar(msgspec.Struct, frozen=True):
    """One bar of a waterfall; seconds since the request began."""

    name: str
    """``queue``: no engine computes yet; ``prefill``; ``hand-over``: until decode's first byte;
    ``decode``."""
    engine: str
    from_s: float
    to_s: float


class RequestView(msgspec.Struct, frozen=True):
    """One request, under way or ended."""

    request_id: str
    path: str
    began_unix_s: float
    outcome: str
    status: int | None
    cause: str
    tries: int
    """How often engines were asked for it."""
    sent_bytes: int
    prefill: str
    decode: str
    """The engines that counted; empty if there was none."""
    phases: list[PhaseBar]


class EngineView(msgspec.Struct, frozen=True):
    """One engine."""

    role: str
    url: str
    state: str
    """One of `kvconnect.proxy.engines.pool.ENGINE_STATES`."""
    in_flight: int
    retry_in_s: float
    metrics: str
    """Empty if its ``/metrics`` could be read, else why not."""


class TransferView(msgspec.Struct, frozen=True):
    """What an engine read from one peer on one path between two looks at its metrics."""

    at_unix_s: float
    source: str
    to: str
    path: str
    """``direct`` or ``staged``; empty if the engine does not say."""
    reads: int
    nbytes: int
    gb_s: float | None
    """Of the reads themselves; None if they were too short to be measured."""


class HeldView(msgspec.Struct, frozen=True):
    """Blocks of an engine in which no request of its own computes."""

    engine: str
    cause: str
    blocks: int
    oldest_s: float


class TierView(msgspec.Struct, frozen=True):
    """What an engine's prompts found in one tier, in tokens, since the engine's start."""

    engine: str
    tier: str
    found: int
    asked: int | None
    """How many were looked for; None if the engine does not say."""


class ErrorView(msgspec.Struct, frozen=True):
    """How often something went wrong, since the start of the one that counted it."""

    where: str
    cause: str
    count: int


class UiSnapshot(msgspec.Struct, frozen=True):
    """One event of `/ui/events`."""

    first: bool
    """Nothing was sent before it: ``recent`` holds all that is remembered."""
    engines: list[EngineView]
    running: list[RequestView]
    recent: list[RequestView]
    """Requests that ended since the event before, in the order in which they ended."""
    transfers: list[TransferView]
    held: list[HeldView]
    tiers: list[TierView]
    errors: list[ErrorView]


def request_view(life: RequestLife, now_s: float) -> RequestView:
    """A request as it is shown now."""
    legs = {leg.role: leg.url for leg in life.tries}
    return RequestView(
        request_id=life.request_id,
        path=life.path,
        began_unix_s=life.began_unix_s,
        outcome=life.outcome,
        status=life.status,
        cause=life.cause,
        tries=len(life.tries),
        sent_bytes=life.sent_bytes,
        prefill=legs.get("prefill", ""),
        decode=legs.get("decode", ""),
        phases=list(_phases(life, now_s)),
    )


def _phases(life: RequestLife, now_s: float) -> Iterable[PhaseBar]:
    """Each lasts until the next one begins. What prefill did not do, decode's engine did."""
    prefill, decode = life.leg("prefill"), life.leg("decode")
    if prefill and ((prefill.status or 0) >= 400 or (life.cause and prefill.status is None)):
        prefill = None
    first_byte_s = decode.answered_s if decode else None
    begins = [("queue", "", life.began_s)]
    if computes := prefill or decode:
        begins.append(("prefill", computes.url, computes.asked_s))
    if prefill:
        # asked at once, decode may answer before prefill does
        ends = [at for at in (prefill.answered_s, first_byte_s) if at is not None]
        if ends:
            begins.append(("hand-over", prefill.url, min(ends)))
    if decode and first_byte_s is not None:
        begins.append(("decode", decode.url, first_byte_s))
    ended_s = now_s if life.ended_s is None else life.ended_s
    until = [at for _, _, at in begins[1:]] + [ended_s]
    for (name, engine, begin), end in zip(begins, until, strict=True):
        yield PhaseBar(name, engine, round(begin - life.began_s, 6), round(end - life.began_s, 6))


def engine_view(role: str, engine: EngineState, metrics: str) -> EngineView:
    """An engine as it is shown now."""
    return EngineView(role, engine.url, engine.state, engine.in_flight, engine.retry_in_s, metrics)
