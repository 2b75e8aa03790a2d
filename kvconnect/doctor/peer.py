"""A running engine, greeted as a reader does: who it is, how we would read it, and how fast."""

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvconnect.config import PeerConfig
from kvconnect.control import wire
from kvconnect.control.dialer import Dialer
from kvconnect.control.peer import Peer, PeerState
from kvconnect.control.wire import Address
from kvconnect.doctor.finding import Finding, Verdict, fault
from kvconnect.doctor.inspected import Greeting, InspectedEngine, InspectError, pair
from kvconnect.doctor.link import LinkJob, measure
from kvconnect.doctor.speed import judge
from kvconnect.telemetry.bandwidth import raw_copy

SLOW_S = 0.01
ROUND_TRIPS = 9
ANSWER_S = 5.0
SECRETS = "auth_secret_file, or KVCONNECT_AUTH_SECRET, must hold the same on both"


def look(
    address: Address,
    secret: bytes,
    config: PeerConfig,
    ours: Mapping[str, str],
    expected: float | None,
    engines: list[InspectedEngine],
) -> Iterator[Finding]:
    """``ours``: what is known of our fingerprint. The engine is added to ``engines``."""
    subject = f"peer {address}"
    try:
        with Greeting(secret, config.handshake_timeout) as greeting:
            engine = greeting.engine(address)
            engines.append(engine)
            yield from facts(engine, subject)
            yield from model(engine.fingerprint, ours, subject)
            yield from path(engine, config, subject)
            yield from speed(greeting, engine, config, expected, subject)
    except InspectError as e:
        remedy = SECRETS if "secret" in str(e) else "is the engine up, and the port its key port?"
        yield fault(subject, str(e).removeprefix(f"{address}: "), remedy)


def facts(engine: InspectedEngine, subject: str) -> Iterator[Finding]:
    """Who it is."""
    versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
    layers = engine.ranks[0].layers
    shape = "; ".join(
        f"{one.count} layers of {one.blocks} blocks of {one.block_tokens} tokens, heads "
        f"{one.heads}, {one.dtype}, {one.layout}"
        for one in layers
    )
    said = f"wire {engine.wire_version}, {engine.transport}, {versions}"
    yield Finding(subject, f"{said}, {len(engine.ranks)} rank(s)")
    yield Finding(f"{subject} geometry", shape)


def model(theirs: Mapping[str, str], ours: Mapping[str, str], subject: str) -> Iterator[Finding]:
    """Fields of the fingerprint that both sides say."""
    differ = {name for name in ours if ours[name] != theirs.get(name)}
    for name in sorted(differ):
        fact = f"{name} is {theirs.get(name)!r}, ours is {ours[name]!r}"
        remedy = "serve the same model with the same settings on both, or look at another peer"
        yield Finding(f"{subject} model", fact, Verdict.FAULT, remedy)
    if not ours:
        what = ", ".join(f"{name} {value}" for name, value in theirs.items())
        hint = "--model MODEL compares it with yours"
        yield Finding(f"{subject} model", f"not compared: {what}", remedy=hint)
    elif not differ:
        yield Finding(f"{subject} model", f"the same {', '.join(sorted(ours))}")


def path(engine: InspectedEngine, config: PeerConfig, subject: str) -> Iterator[Finding]:
    """Direct or staged, as far as it depends on options and not on our geometry."""
    subject, mode = f"{subject} path", config.transfer_mode
    chosen = config.chosen_transport(_memory(engine))[0]
    direct = engine.direct and mode != "staged"
    staged = engine.staged and mode != "direct"
    if chosen != engine.transport:
        fact = f"its transport is {engine.transport}, ours is {chosen}"
        yield Finding(subject, fact, Verdict.FAULT, "set the same transport on both engines")
    elif direct and staged:
        same = "direct where block size, layout and dtype are the same and it is faster"
        yield Finding(subject, f"either: {same}, else staged; transfer_mode is auto on both")
    elif direct:
        who = "ours" if mode == "direct" else "its"
        hint = "auto also pairs engines of another block size, layout or dtype"
        yield Finding(subject, f"direct only, by {who} transfer_mode", remedy=hint)
    elif staged:
        who = "ours" if mode == "staged" else "its"
        yield Finding(subject, f"staged only, by {who} transfer_mode")
    else:
        fact = f"none: ours is {mode}, and it offers " + ("direct" if engine.direct else "staged")
        yield Finding(subject, fact, Verdict.FAULT, "set transfer_mode to auto on both engines")


def speed(
    greeting: Greeting,
    engine: InspectedEngine,
    config: PeerConfig,
    expected: float | None,
    subject: str,
) -> Iterator[Finding]:
    """Round trips of its control channel, and a read of memory that it registered."""
    ask, peer = asker(greeting.dialer, greeting.step), greeting.peers[0]
    trips = [ask(peer) for _ in range(ROUND_TRIPS)]
    trip = statistics.median(trips)
    fact = f"{trip * 1e3:.2f} ms, the longest {max(trips) * 1e3:.2f}"
    if trip < SLOW_S:
        yield Finding(f"{subject} round trip", fact)
    else:
        fact += f", expected less than {SLOW_S * 1e3:g} ms: a slow link, or a busy engine"
        remedy = (
            "`ping` it; are both in one network, and is no VPN or shaping (`tc qdisc`) between?"
        )
        yield Finding(f"{subject} round trip", fact, Verdict.WARNING, remedy)
    name, options = config.chosen_transport(_memory(engine))
    body, subject = engine.bodies[0], f"{subject} bandwidth"
    if name != engine.transport or not body.direct or not body.regions:
        yield Finding(subject, "not measured: its memory cannot be read, only staged")
        return
    job = LinkJob(name, options, "", body.hello, body.regions[0])
    seen = measure(job, lambda: _keep_awake(ask, peer))
    if seen.error:  # over TCP NIXL only writes, and nothing of ours writes to an engine unasked
        yield Finding(subject, f"not measured, so KV will be staged: {seen.error}")
    else:
        yield judge(subject, seen, raw_copy(), expected)


def both(engines: list[InspectedEngine]) -> Iterator[Finding]:
    """The second engine reading from the first, as their movers decide it."""
    found = pair(*engines[:2])
    for difference in found.differences:
        yield Finding("pair", difference, Verdict.FAULT, "serve the same model on both")
    for name, one in (("direct", found.direct), ("staged", found.staged)):
        yield Finding(f"pair, {name}", one.detail or f"no: {one.why_not}")
    if not (found.direct.works or found.staged.works):
        yield Finding("pair", "no path", Verdict.FAULT, "see what is said of both paths")


def asker(dialer: Dialer, step: Callable[[], None]) -> Callable[[Peer], float]:
    """Asks what any engine refuses at once, which changes nothing there; returns the seconds."""

    def ask(peer: Peer) -> float:
        began = time.perf_counter()

        def opens(seq: int) -> wire.Message:
            lease_id = secrets.token_hex(16)
            return wire.Open(
                seq=seq, lease_id=lease_id, request_id=None, reader=0, tokens=1, digest=b""
            )

        call = dialer.calls.send(peer, opens, (wire.Refused,), time.monotonic() + ANSWER_S)
        while call.reply is None and not call.error:
            step()
        if call.error:
            raise InspectError(call.error)
        return time.perf_counter() - began

    return ask


def _keep_awake(ask: Callable[[Peer], float], peer: Peer) -> None:
    """An idle engine looks after its transport once a second; one that is asked, at once."""
    with contextlib.suppress(InspectError):
        if peer.state is PeerState.READY:
            ask(peer)
    time.sleep(0.001)


def _memory(engine: InspectedEngine) -> str:
    kinds: set[Any] = {region.kind for body in engine.bodies for region in body.regions}
    return "cuda" if "VRAM" in kinds else "cpu"
