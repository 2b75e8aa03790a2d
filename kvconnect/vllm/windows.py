"""Sliding windows at the decode side: which tokens a load needs, and blocks that it leaves partial.

vLLM frees a block once no window sees any of its tokens. Where prefill's blocks are smaller than
ours, it has freed tokens that are in the first block of ours that our window sees. We load that
block without them. Nothing of this request reads them, but another request with the same beginning
may: one that ends earlier sees further back. So such a block may be in no prefix cache.

* vLLM caches the block when the load has ended, as the next step schedules. It tells us of the
  request in that step again (`admitted`), and there we evict the block.
* Between the two no other request may look at the prefix cache: `holds_back` says so.
* Without the block pool (a vLLM that does not hand it over) no load is partial.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvconnect.vllm import _compat


class Windows:
    """The sliding windows of one engine's transferred KV cache groups."""

    def __init__(self, kv_cache_config: Any, groups: Sequence[int]) -> None:
        specs = [kv_cache_config.kv_cache_groups[g].kv_cache_spec for g in groups]
        self._sizes = [spec.block_size for spec in specs]
        self._specs = [
            _compat.layer_spec(spec, next(iter(getattr(spec, "kv_cache_specs", ("",)))))
            for spec in specs
        ]
        self._pool: Any = None
        self._partial: dict[str, set[int]] = {}  # request → blocks that lack their first tokens
        self._cached: set[str] = set()  # of those, the ones whose blocks may be in the prefix cache

    def bind(self, block_pool: Any) -> None:
        """The pool whose prefix cache no partial block may be in."""
        self._pool = block_pool

    def needed_from(self, tokens: int, held_from: int | None) -> tuple[int, ...]:
        """Per group the first token to ask for, of a prompt of which ``tokens`` are loaded.

        ``held_from``: all that the source holds is from this token on; None if it does not say.
        """
        return tuple(
            self._needed(spec, size, tokens, held_from)
            for spec, size in zip(self._specs, self._sizes, strict=True)
        )

    def _needed(self, spec: Any, size: int, tokens: int, held_from: int | None) -> int:
        if self._pool is None or not isinstance(spec, SlidingWindowSpec):
            return 0
        seen: int = tokens - spec.sliding_window + 1 - getattr(spec, "extra_retained_tokens", 0)
        needed = max(seen, 0)
        block = needed // size * size
        if held_from is not None and held_from <= needed:
            return max(block, held_from)
        return needed

    def load(
        self,
        request_id: str,
        blocks: Sequence[Iterable[tuple[int, int]]],
        needed_from: Sequence[int],
    ) -> None:
        """These blocks, by their places, are loaded from those tokens on."""
        partial = {
            block
            for pairs, size, start in zip(blocks, self._sizes, needed_from, strict=False)
            for place, block in pairs
            if place * size < start
        }
        if partial:
            self._partial[request_id] = partial

    def received(self, request_id: str) -> None:
        """The load has ended: vLLM caches its blocks when it next schedules."""
        if request_id in self._partial:
            self._cached.add(request_id)

    def holds_back(self, request_id: str) -> bool:
        """Whether this request has to wait, for it might find another's partial block cached."""
        return bool(self._cached - {request_id})

    def done(self, request_id: str) -> None:
        """The request runs or has ended: its partial blocks leave the prefix cache."""
        partial = self._partial.pop(request_id, None)
        if partial and request_id in self._cached:
            self._cached.discard(request_id)
            self._pool.evict_blocks(partial)


def held_from(tables: Sequence[Sequence[int]], sizes: Sequence[int], missing: int) -> int:
    """The first token from which on every group's table has all blocks."""
    return max(
        size * max((i + 1 for i, block in enumerate(table) if block == missing), default=0)
        for table, size in zip(tables, sizes, strict=True)
    )
