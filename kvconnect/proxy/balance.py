"""In which order engines are asked that are all up: the policy, without time or failures.

- ``least-loaded``: fewest tokens in flight first, by turns among equals.
- ``prefix``: prompts that begin alike go to one engine, whose prefix cache then has the beginning.
  Rendezvous hashing: no table, the same in every worker and after a restart, and an engine that
  comes or goes moves only its own share.
- ``round-robin``: by turns.
- A key (a session, or a prompt's head) is stronger than the policy's turn. An engine that has
  `CROWDED` times its share of the load is passed over: what one cache hit saves is less than that.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

Policy = Literal["least-loaded", "prefix", "round-robin"]

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


def in_order(engines: Sequence[_E], policy: Policy, turn: int, key: bytes | None) -> list[_E]:
    """All of ``engines``, whom to ask first at the front.

    Parameters:
        engines: those that are up, in a constant order.
        policy: the operator's choice.
        turn: how many were asked before.
        key: requests with the same one belong to the same engine; None: to any.
    """
    start = turn % len(engines) if engines else 0
    turns = [*engines[start:], *engines[:start]]
    if policy == "round-robin" and key is None:
        return turns
    if key is None:
        return sorted(turns, key=lambda engine: engine.tokens)
    share = sum(engine.tokens for engine in engines) / max(1, len(engines))
    bound = max(_AT_EASE_TOKENS, CROWDED * share)
    at_ease = [engine for engine in engines if engine.tokens <= bound]
    crowded = [engine for engine in engines if engine.tokens > bound]
    at_ease.sort(key=lambda engine: _rank(engine.url, key))
    return at_ease + sorted(crowded, key=lambda engine: engine.tokens)


def _rank(url: str, key: bytes) -> bytes:
    return hashlib.blake2b(key + b"\0" + url.encode(), digest_size=8).digest()
