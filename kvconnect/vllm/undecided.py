"""Requests whose offer is still being found out, by what is asked about.

Thousands may wait for one bootstrap endpoint. They are kept together, so that a step looks at the
endpoint once and not at each of them.
"""

from collections.abc import Hashable
from typing import Any


class Undecided:
    """Not thread-safe: the scheduler's thread owns it."""

    def __init__(self) -> None:
        self._about: dict[Hashable, dict[str, Any]] = {}  # what is asked → request id → request
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def waits_for(self, about: Hashable) -> bool:
        """Whether some request waits for the same answer."""
        return about in self._about

    def asked(self) -> list[Hashable]:
        """All that requests wait for."""
        return list(self._about)

    def first(self, about: Hashable) -> Any | None:
        """The request that has waited longest for this answer."""
        return next(iter(self._about.get(about, {}).values()), None)

    def add(self, about: Hashable, request: Any) -> None:
        """The request waits for this answer."""
        self._about.setdefault(about, {})[request.request_id] = request
        self._ids.add(request.request_id)

    def remove(self, about: Hashable, request: Any) -> None:
        """The request waits no more."""
        self._ids.discard(request.request_id)
        waiting = self._about[about]
        del waiting[request.request_id]
        if not waiting:
            del self._about[about]
