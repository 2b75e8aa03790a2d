"""Loads that may wait for prefill: half of our blocks at most.

vLLM allocates a load's blocks when it begins, and preempts none. Where a router asks both engines
at once, a load begins before its prompt is computed. An engine that is full of such loads can take
no other; prefill, full of what those others were to read, computes none: each waits for the other.

* An early load that would not fit into that share waits in vLLM's queue, which lets others pass,
  until others have ended, or movers report that prefill has computed it.
* What is computed is loaded whoever holds that share: it waits for nobody, and prefill's blocks
  are free once it is read. It finds blocks, for the longest prompt that vLLM takes fits beside.
"""

from collections.abc import Iterable, Sequence

from kvconnect.planner import Planner


class EarlyLoads:
    """Those of one engine; its scheduler's half tells it of every load."""

    def __init__(
        self, planner: Planner, num_blocks: int, block_tokens: Sequence[int], most_tokens: int
    ) -> None:
        """``num_blocks``: of all groups together; ``block_tokens``: of a block of each group;
        ``most_tokens``: of a prompt.
        """
        self._planner = planner
        self._block_tokens = block_tokens
        beside = num_blocks - 1 - self._blocks(most_tokens)  # vLLM keeps one as a placeholder
        self.most = max(min(num_blocks // 2, beside), 0)
        """How many blocks all of them may hold together."""
        self._held: dict[str, int] = {}  # request that loads early → blocks that it holds
        self._in_use = 0  # their sum: whoever waits is asked about in every step
        self._waiting: dict[str, bool] = {}  # request that waits → whether prefill computed it

    def may_begin(self, request_id: str, tokens: int) -> bool:
        """Whether so many tokens of a request may be loaded now."""
        if self._waiting.get(request_id) or not self._planner.is_early(request_id):
            return True
        if self._blocks(tokens) + self._in_use <= self.most:
            return True
        if request_id not in self._waiting:
            self._waiting[request_id] = False
            self._planner.report_computed(request_id)
        return False

    def begins(self, request_id: str, tokens: int) -> None:
        """A request has its blocks, and loads so many tokens, or none."""
        computed = self._waiting.pop(request_id, False)
        early = not computed and self._planner.is_early(request_id)
        if tokens and early and request_id not in self._held:
            self._held[request_id] = self._blocks(tokens)
            self._in_use += self._held[request_id]

    def computed(self, request_ids: Iterable[str]) -> None:
        """Movers say that prefill has computed these, or never will."""
        for request_id in self._waiting.keys() & set(request_ids):
            self._waiting[request_id] = True

    def ended(self, request_id: str) -> None:
        """Its load has, and its blocks are its own, or free. Idempotent."""
        self._in_use -= self._held.pop(request_id, 0)

    def forget(self, request_id: str) -> None:
        """The request has ended; its load may not have."""
        self._waiting.pop(request_id, None)

    def ask_again(self) -> None:
        """There are other movers."""
        self._waiting = {r: True for r, computed in self._waiting.items() if computed}

    def _blocks(self, tokens: int) -> int:
        return sum(-(-tokens // size) for size in self._block_tokens)
