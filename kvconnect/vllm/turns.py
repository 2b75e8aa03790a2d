"""Turns of a conversation: what decode holds when it has answered, lent to prefill's next prompt.

* Lent are whole steps of tokens, prompt and answer, under a lease of its own with digests of its
  beginnings: the next prompt may be another than what was answered, where a chat template drops the
  reasoning. It loads what agrees, and no more; see docs/adr/0009-both-ways.md.
* A next turn may never come, so these leases give way, the oldest first. Together they keep no more
  blocks than are free; and a request that got no blocks takes as many as it wants. So does one
  that has loaded a part, of which vLLM does not ask again, and lets nobody pass it.
* What is kept here is which leases may give way, and to whom: why blocks are held is told by
  `held`, and which requests vLLM keeps for any lease by `lent`.
* Not lent: samples, media and embeddings, what a window or a recurrent state has let go of, and
  anything of an engine that drafts tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from kvconnect.lease import Terms
from kvconnect.vllm import _compat
from kvconnect.vllm.params import LEAST_STEP, Prompt
from kvconnect.vllm.prefill_progress import only_grows

MOST_STEPS = 1024


def step_of(tokens: int) -> int:
    """How many tokens apart the digests are of a sequence of so many tokens."""
    step = LEAST_STEP
    while tokens > step * MOST_STEPS:
        step *= 2
    return step


class LentTurns:
    """The leases of one decode engine's answers. Not thread-safe: vLLM's scheduler calls it."""

    def __init__(self, ttl_s: float, vllm_config: Any, kv_cache_config: Any) -> None:
        """``ttl_s``: how long a next turn is waited for."""
        self._ttl_s = ttl_s
        self._groups = _compat.transfer_group_ids(kv_cache_config)
        specs = [kv_cache_config.kv_cache_groups[g].kv_cache_spec for g in self._groups]
        self._sizes = [spec.block_size for spec in specs]
        self._off = vllm_config.speculative_config is not None or not all(map(only_grows, specs))
        self._pool: Any = None
        self._held: dict[str, int] = {}  # request id → blocks, the oldest first
        self._ending: dict[str, int] = {}  # the same, of those that are revoked
        self._refused: dict[str, int] = {}  # request that got no blocks in this step → how many
        self._admitted: dict[str, Any] = {}  # request that has blocks, and has computed nothing
        self._loaded: set[str] = set()  # of those, the ones whose load has ended

    def bind(self, block_pool: Any) -> None:
        """The pool that the blocks are of; without it nothing is lent."""
        self._pool = block_pool

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._held

    def lend(
        self, request: Any, tables: Sequence[Sequence[int]], adapter: str | None
    ) -> Terms | None:
        """What may be lent of a request that has been answered; None: nothing.

        ``tables``: its blocks of each group; ``adapter`` as in `Prompt`.
        """
        if self._off or self._pool is None:
            return None
        # the last token was sampled, and not computed with; some may be computed that do not count
        tokens = min(request.num_computed_tokens, len(request.all_token_ids) - 1)
        step = step_of(tokens)
        digests = Prompt(request, adapter).prefixes(step, request.all_token_ids[:tokens])
        blocks = sum(map(len, tables))
        if not digests or blocks > self._pool.get_num_free_blocks():
            return None
        self._held[request.request_id] = blocks
        tokens = step * len(digests)
        kept = tuple(
            tuple(table[: -(-tokens // size)])
            for table, size in zip(tables, self._sizes, strict=True)
        )
        prefixes = {step * (i + 1): digest for i, digest in enumerate(digests)}
        return Terms(
            request.request_id, "", kept, tokens, digests[-1], self._ttl_s, prefixes=prefixes
        )

    def asked(self, request: Any) -> None:
        """A request is to be admitted, if there are blocks for it."""
        if self._held:
            self._refused[request.request_id] = self._blocks(request.num_tokens)

    def admitted(self, request: Any) -> None:
        """It has its blocks, or those that are loaded first. Idempotent."""
        self._refused.pop(request.request_id, None)
        self._admitted[request.request_id] = request

    def received(self, request_id: str) -> None:
        """Its load has ended: it wants the blocks for the rest."""
        if request_id in self._admitted:
            self._loaded.add(request_id)

    def forget(self, request_id: str) -> None:
        """It wants no blocks, or none yet. Idempotent."""
        self._refused.pop(request_id, None)
        self._admitted.pop(request_id, None)
        self._loaded.discard(request_id)

    @property
    def uncomputed(self) -> dict[str, bool]:
        """Requests that have blocks and have computed nothing: whether their load has ended."""
        return {one: one in self._loaded for one in self._admitted}

    def step(self, request_ids: Collection[str]) -> None:
        """These requests compute in this step."""
        for request_id in self._admitted.keys() & request_ids:
            self.forget(request_id)

    def over(self, request_ids: Iterable[str]) -> None:
        """The blocks of these requests are free, or about to be."""
        for request_id in request_ids:
            self._held.pop(request_id, None)
            self._ending.pop(request_id, None)

    def to_revoke(self, everything: bool = False) -> list[str]:
        """Once a step, when it is scheduled: the requests whose blocks are wanted now."""
        if not self._held:
            return []
        refused, self._refused = max(self._refused.values(), default=0), {}
        # vLLM may want more than we count: who is refused with enough blocks free gets one lease
        least = int(refused > 0 and not self._ending)
        wanted = max((refused, *(self._rest(self._admitted[one]) for one in self._loaded)))
        free = self._pool.get_num_free_blocks() + sum(self._ending.values())
        held = sum(self._held.values())
        revoked: list[str] = []
        for request_id, blocks in list(self._held.items()):
            if not everything and held <= free and wanted <= free and len(revoked) >= least:
                break
            self._ending[request_id] = self._held.pop(request_id)
            free, held = free + blocks, held - blocks
            revoked.append(request_id)
        return revoked

    def _blocks(self, tokens: int) -> int:
        return sum(-(-tokens // size) for size in self._sizes)

    def _rest(self, request: Any) -> int:
        return self._blocks(request.num_tokens) - self._blocks(request.num_computed_tokens)
