"""Eviction: which key has to go when a new one comes.

`make` gives a policy by name. `kvconnect.offload.eviction.base` says what every policy promises;
`kvconnect_bench.traces` compares their hit rates with the best possible.
"""

from collections.abc import Callable

from kvconnect.errors import ConfigError
from kvconnect.offload.eviction.arc import Arc
from kvconnect.offload.eviction.base import Insertion, Key, Policy
from kvconnect.offload.eviction.lru import Lru

POLICIES: dict[str, Callable[[int], Policy]] = {"lru": Lru, "arc": Arc}


def make(name: str, capacity: int) -> Policy:
    """The policy called ``name``, for ``capacity`` keys."""
    if name not in POLICIES:
        raise ConfigError(f"eviction_policy is {name!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[name](capacity)


__all__ = ["POLICIES", "Arc", "Insertion", "Key", "Lru", "Policy", "make"]
