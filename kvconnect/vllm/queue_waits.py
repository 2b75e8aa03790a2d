"""How vLLM's processes wait for each other in steps that compute nothing (see `idle`).

The engine core and its workers tell each other by queues in shared memory, whose readers spin for a
second after each message: steps follow each other, and a process that sleeps wakes up late. Where a
worker waits on purpose nothing is won by that, and it takes from whoever else is on the cores.

* `watch` changes how this process waits: in such a step it sleeps until it is notified.
* A notification may be lost (vLLM sends it by a socket that drops what comes too fast), so nobody
  sleeps for longer than `SLEEP_MS` before it looks itself.
* In all other steps vLLM waits as ever, from the first one on.
"""

import functools
import logging
import math
from typing import Any

from kvconnect.vllm import _compat

logger = logging.getLogger(f"vllm.{__name__}")

SLEEP_MS = 5
MARK = "_kvconnect_sleeps"  # attribute of what replaces a method of vLLM's

_sleeps = False


def sleep(sleeps: bool) -> None:
    """Say whether this process is in a step that computes nothing."""
    global _sleeps
    _sleeps = sleeps


def watch() -> bool:
    """Change how this process waits for the others; whether it could be done. Idempotent."""
    waits = _compat.queue_wait_class()
    if waits is None:
        logger.info(
            "kvconnect: the queues between this vLLM's processes are not known: while all requests "
            "wait for KV, its engine core spins"
        )
        return False
    if not hasattr(waits.wait, MARK):
        waits.wait = _sleeping(waits.wait)
    return True


def _sleeping(wait: Any) -> Any:
    @functools.wraps(wait)
    def wait_or_sleep(self: Any, timeout_ms: int | None = None) -> None:
        if not _sleeps:
            wait(self, timeout_ms)
            return
        read_at, self.last_read = self.last_read, -math.inf  # it spins if that was just now
        try:
            wait(self, SLEEP_MS if timeout_ms is None else min(timeout_ms, SLEEP_MS))
        finally:
            self.last_read = read_at

    setattr(wait_or_sleep, MARK, True)
    return wait_or_sleep
