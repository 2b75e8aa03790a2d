"""Eviction: which key has to go when a new one comes.

`make` gives a policy by name. `kvconnect.offload.eviction.base` says what every policy promises;
`kvconnect_bench.traces` compares their hit rates with the best possible.
"""

from kvconnect.errors import ConfigError
from kvconnect.offload.eviction.base import Insertion, Key, Policy
from kvconnect.offload.eviction.lru import Lru

POLICIES = ("lru", "arc")


def make(name: str, capacity: int) -> Policy:
    """The policy called ``name``, for ``capacity`` keys."""
    match name:
        case "lru":
            return Lru(capacity)
        case "arc":
            from kvconnect.offload.eviction.arc import Arc

            return Arc(capacity)
    raise ConfigError(f"eviction_policy is {name!r}, expected one of {', '.join(POLICIES)}")


__all__ = ["POLICIES", "Insertion", "Key", "Lru", "Policy", "make"]
