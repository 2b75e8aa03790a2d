"""A request that a producer computes step by step, as its scheduler sees it.

prefill = Prefill(engine, tokens=30, seed=7)
prefill.compute(8)                       # the first 8 tokens' blocks are complete
prefill.preempt()                        # its blocks are somebody else's
prefill.compute(30)
prefill.finish()                         # leased
"""

import itertools

import numpy as np

from kit.engines import Engine
from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, RenewLease, Source
from kvconnect.planner import Planner

TTL_S = 5.0
NUMBERS = itertools.count()


class Prefill:
    """``free``: ids of the blocks that the engine has to give; several requests may share it."""

    def __init__(
        self, engine: Engine, tokens: int, seed: int, free: list[int] | None = None
    ) -> None:
        self.engine = engine
        self.tokens = tokens
        self.seed = seed
        self.digest = seed.to_bytes(8, "big")
        self.request_id = f"p{next(NUMBERS)}"
        self.planner = Planner()
        self.free = list(range(engine.caches[0].num_blocks)) if free is None else free
        self.blocks: list[int] = []
        self.told = 0
        self.said: list[int] | None = None  # blocks that readers were told of, if any were
        self.state = "promised"
        self.planner.promise(self.request_id)
        self._give()

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.engine.caches[0].model.block_tokens

    def source(self, wait_s: float = 30.0, key_address: Address | None = None) -> Source:
        """As a router tells it that asks both engines at once."""
        where = key_address or self.engine.key_addresses[0]
        return Source((where,), self.request_id, None, TTL_S, wait_s)

    def compute(self, tokens: int) -> bool:
        """A step has ended: so many tokens of the prompt are computed now, if there are blocks."""
        if not self._fill(tokens):
            return False
        complete = tokens // self.size
        new = self.blocks[self.told : complete]
        if new or not self.told:
            self.planner.progress(self.request_id, [new], self.tokens, self.digest)
            self.said = [*(self.said or ()), *new]
        self.told = max(self.told, complete)
        self._give()
        return True

    def preempt(self) -> None:
        """Its blocks go to others, and it is to be computed anew."""
        self._lose_blocks()
        self._restart()
        self._give()

    def finish(self, tokens: int | None = None) -> bool:
        """The rest is computed, and all of it leased; ``tokens``: of another number than said."""
        tokens = tokens or self.tokens
        if not self._fill(tokens):
            return False
        if tokens != self.tokens or self.said != self.blocks[: len(self.said or ())]:
            self._restart()
        held = (tuple(self.blocks),)
        self.planner.grant(Terms(self.request_id, "", held, tokens, self.digest, TTL_S))
        self.state = "granted"
        self._give()
        return True

    def abort(self) -> None:
        """It ends without KV, and its blocks go to others."""
        self._lose_blocks()
        self.planner.withdraw(self.request_id)
        self.state = "withdrawn"
        self._give()

    def freed(self) -> None:
        """All ranks said that its lease is over."""
        self._lose_blocks()
        self.state = "freed"

    def _restart(self) -> None:
        if self.said is not None:
            self.planner.restart(self.request_id)
            self.said = None

    def _fill(self, tokens: int) -> bool:
        """Compute so many tokens into blocks, if there are enough."""
        missing = -(-tokens // self.size) - len(self.blocks)
        if missing > len(self.free):
            return False
        self.blocks += [self.free.pop() for _ in range(missing)]
        for cache in self.engine.caches:
            cache.fill(self.blocks, self.seed)
        return True

    def _lose_blocks(self) -> None:
        for cache in self.engine.caches:
            scribble(cache, self.blocks)
        self.free += self.blocks
        self.blocks, self.told = [], 0

    def _give(self) -> None:
        self.engine.put(*self.planner.take_orders())


def scribble(cache, blocks) -> None:
    """Somebody else's KV, other bytes at every place."""
    for layer, part in itertools.product(cache.layers, range(cache.parts)):
        cells = cache.cells(layer, part)
        cells[list(blocks)] = np.invert(cells[list(blocks)])


def fetch_early(decode: Engine, request_id: str, prefill: Prefill, table, wait_s=30.0) -> None:
    """Fetch what a request computes into blocks, by pairs of place and id or all from 0 on."""
    pairs = tuple(p if isinstance(p, tuple) else (i, p) for i, p in enumerate(table))
    source = prefill.source(wait_s)
    order = Fetch(request_id, source, (pairs,), prefill.tokens, prefill.digest)
    decode.put(RenewLease(request_id, source), order)
