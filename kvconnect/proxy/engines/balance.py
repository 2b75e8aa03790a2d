"""In which order engines are asked that are all up: the policy, without time or failures.

- ``least-loaded``: fewest tokens in flight first, by turns among equals.
- ``prefix``: prompts that begin alike go to one engine, whose prefix cache then has the beginning.
  Rendezvous hashing: no table, the same in every worker and after a restart, and an engine that
  comes or goes moves only its own share.
- ``kv-aware``: fewest tokens in flight, with those of the request that the engine does not hold.
- ``round-robin``: by turns.
- A key (a session, or a prompt's head) is stronger than the policy's turn. An engine that has
  `CROWDED` times its share of the load is passed over: what one cache hit saves is less than that.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

Policy = Literal["least-loaded", "prefix", "kv-aware", "round-robin"]

# What a request costs beside its prompt, in tokens: many short ones are a load, too.
REQUEST_TOKENS = 64
CROWDED = 1.5  # less than 2: of two engines none ever has more than twice its share
# Below so many tokens in flight no engine is crowded, whatever the others have.
_AT_EASE_TOKENS = 4096


class LoadedEngine(Protocol):
    """What the policy sees of an engine."""

    @property
    def url(self) -> str: ...
    @property
    def tokens(self) -> int: ...


_E = TypeVar("_E", bound=LoadedEngine)


def in_order(
    engines: Sequence[_E],
    policy: Policy,
    turn: int,
    key: bytes | None,
    held: Mapping[str, int] | None = None,
) -> list[_E]:
    """All of ``engines``, whom to ask first at the front.

    Parameters:
        engines: those that are up, in a constant order.
        policy: the operator's choice.
        turn: how many were asked before.
        key: requests with the same one belong to the same engine; None: to any.
        held: of the request's tokens those that an engine, by its URL, need not compute.
    """
    start = turn % len(engines) if engines else 0
    turns = [*engines[start:], *engines[:start]]
    if policy == "round-robin" and key is None:
        return turns
    if key is None:
        saved = held or {}
        return sorted(turns, key=lambda engine: engine.tokens - saved.get(engine.url, 0))
    bound = crowded_from(engines)
    at_ease = [engine for engine in engines if engine.tokens <= bound]
    crowded = [engine for engine in engines if engine.tokens > bound]
    at_ease.sort(key=lambda engine: _rank(engine.url, key))
    return at_ease + sorted(crowded, key=lambda engine: engine.tokens)


def crowded_from(engines: Sequence[LoadedEngine]) -> float:
    """An engine with more tokens in flight than that has too much of the load."""
    share = sum(engine.tokens for engine in engines) / max(1, len(engines))
    return max(_AT_EASE_TOKENS, CROWDED * share)


def _rank(url: str, key: bytes) -> bytes:
    return hashlib.blake2b(key + b"\0" + url.encode(), digest_size=8).digest()
