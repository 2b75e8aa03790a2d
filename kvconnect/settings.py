"""What a mover is told of the engine that it works for."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Mode = Literal["auto", "direct", "staged"]


class Settings(NamedTuple):
    """What a mover needs to know of its engine. ``rank`` counts over TP × PP."""

    rank: int
    ranks: int
    fingerprint: Mapping[str, str]
    transport_name: str
    secret: bytes | None = None
    handshake_timeout_s: float = 5.0
    load_timeout_s: float = 60.0
    lease_max_s: float = 3600.0
    mode: Mode = "auto"
    allow_lossy: bool = False
    versions: Mapping[str, str] = {}
