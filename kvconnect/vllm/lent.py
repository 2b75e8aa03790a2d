"""What vLLM's scheduler does while blocks are lent: it pauses, and resets its prefix cache.

vLLM keeps a finished request whose blocks are lent among its requests, and counts it as work: a
pause would last until the last reader is done, and a reset of the prefix cache would fail.

* `watch` changes two methods of vLLM's scheduler, in the process that has it.
* Paused, requests whose blocks are only lent are no work. Their leases stand and are read by the
  movers; that they are over is told with the first step after the pause.
* What waits for a conversation's next turn is no work either, paused or not: that takes minutes.
* A reset revokes all leases first, if it can succeed then: if nothing else holds a block. The
  order reaches every rank before the next step writes into a block (`Worker.put`).
* It has vLLM's requests, to free what they hold; which lease gives way is decided by `turns`, and
  `held` counts.
* Blocks that another connector holds as well, beside us in a MultiConnector, are left alone.
"""

import functools
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from kvconnect.vllm import _compat

logger = logging.getLogger(f"vllm.{__name__}")

MARK = "_kvconnect_watches"  # attribute of what replaces a method of vLLM's Scheduler


@runtime_checkable
class HasLeasedBlocks(Protocol):
    """A connector, the one that vLLM made, that knows which requests' blocks are lent."""

    def lent(self) -> Mapping[str, Any]:
        """Finished requests, by id, whose blocks are kept for readers and for nobody else."""

    def next_turns(self) -> Collection[str]:
        """Of those, the ones that are kept until a conversation goes on."""

    def revoke(self, request_ids: Iterable[str]) -> None:
        """End the leases of these requests with the next step, before it writes."""


def watch() -> bool:
    """Change vLLM's scheduler, in this process; whether it could be done. Idempotent."""
    scheduler = _compat.scheduler_class()
    if scheduler is None:
        logger.warning(
            "kvconnect: this vLLM's scheduler is not known: a pause waits for leases, and a reset "
            "of the prefix cache fails while there are some"
        )
        return False
    if not hasattr(scheduler.has_finished_requests, MARK):
        scheduler.has_finished_requests = _but_lent(scheduler.has_finished_requests)
        scheduler.reset_prefix_cache = _revoking(scheduler.reset_prefix_cache)
    return True


def _but_lent(has_finished_requests: Any) -> Any:
    @functools.wraps(has_finished_requests)
    def has_other(self: Any) -> bool:
        found: bool = has_finished_requests(self)
        connector = self.connector
        if not found or self.finished_req_ids or not isinstance(connector, HasLeasedBlocks):
            return found
        running, waiting = self.get_request_counts()
        idle = connector.lent() if _compat.is_paused(self) else connector.next_turns()
        return bool(len(self.requests) - running - waiting - len(idle) > 0)

    setattr(has_other, MARK, True)
    return has_other


def _revoking(reset_prefix_cache: Any) -> Any:
    @functools.wraps(reset_prefix_cache)
    def reset(self: Any, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        _revoke_if_it_helps(self, reset_running_requests)
        done: bool = reset_prefix_cache(self, reset_running_requests, *args, **kwargs)
        return done

    return reset


def _revoke_if_it_helps(scheduler: Any, preempts: bool) -> None:
    """Give all lent blocks back to ``scheduler``, if that and preemption leave none in use."""
    lent = _lent(scheduler.connector)
    if not lent:
        return
    manager = scheduler.kv_cache_manager
    freed = [*lent, *(request.request_id for request in scheduler.running if preempts)]
    blocks = {b for one in freed for group in manager.get_block_ids(one) for b in group}
    if len(blocks - {_compat.NULL_BLOCK}) != _compat.blocks_in_use(manager.block_pool):
        return
    scheduler.connector.revoke(list(lent))
    for request in lent.values():
        manager.free(request)  # vLLM does so again when the request has been sent: it holds none


def _lent(connector: Any) -> Mapping[str, Any]:
    return connector.lent() if isinstance(connector, HasLeasedBlocks) else {}
