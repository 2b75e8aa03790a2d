"""Why a place for stored KV cannot be used. Raised when it is opened, never while serving."""

import enum

from kvconnect.errors import KvConnectError


class Reason(enum.Enum):
    """What to do about it differs."""

    TAKEN = "taken"
    """Another process writes to it: use another place, or only read."""
    FULL = "full"
    """The filesystem has no room for it."""
    FOREIGN = "foreign"
    """It is there, and is not what was expected, or is damaged."""
    FAILED = "failed"
    """The operating system refused."""


class StoreError(KvConnectError):
    """A place for stored KV cannot be opened; the engine goes on without it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
