"""What `cost_engine` is told, and what it says; vLLM is in its process alone."""

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """What connector the engine has."""

    NONE = "no connector"
    NOTHING = "a connector that does nothing"
    AGAIN = "a connector that does nothing, again"
    OFFLOADS = "offloading"
    COUNTED = "offloading, counted"


@dataclass(frozen=True)
class CostPlan:
    """What the engine is to do."""

    model: str
    rounds: int
    requests: int
    """Of a turn, at once."""
    input_tokens: int
    output_tokens: int
    memory_bytes: int
    """For KV on the host."""
    out: str
    """File for what was measured."""


@dataclass(frozen=True)
class CostTurn:
    """What one turn used."""

    state: State
    answered_s: float
    """Seconds until all was answered."""
    cpu_s: float
    """Of the whole process, until all was stored."""
    calls_s: float
    """Of those, in vLLM's calls into the connector; 0 where they are not counted."""
    threads_s: float
    """Of those, of our threads."""


@dataclass(frozen=True)
class CostTurns:
    """All turns, by round, and what the engine counted in all of them, the first ones included."""

    rounds: list[list[CostTurn]]
    hit_tokens: float
    stored_bytes: float
