"""What ``kvconnect bench kernels`` runs: shapes of KV, and one machine's memory to run them in.

Every call takes other blocks, at random, out of a pool far larger than the caches, and writes to
the next window of a ring, so that each figure is one of memory, as in an engine.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvconnect.ops import Copy, Kernels, Prepared, Type, Verb, chunk_bytes
from kvconnect.ops.cuda import CudaKernels
from kvconnect.ops.pages import use_huge_pages

TOKENS, HEADS, WIDTH = 16, 8, 128  # of a block; bf16, as of Llama-3 8B

RUN_KIB = (2, 4, 8, 16, 32, 64, 128, 256)
SCALE = 0.37  # anything that is no power of two


@dataclass(frozen=True)
class KernelShape:
    """Cells of one part of a cache whose base is 0, or of two whose blocks lie together."""

    name: str
    copy: Copy
    run_bytes: int
    """Contiguous bytes of a part of the cache, at least."""
    compare_torch: bool = False
    other: Copy | None = None
    """The other part, V beside K."""

    def __post_init__(self) -> None:
        assert self.copy.base + self.block_bytes <= self.copy.block_stride

    @property
    def copies(self) -> list[Copy]:
        """Of all parts."""
        return [self.copy] if self.other is None else [self.copy, self.other]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block that a call moves."""
        return sum(
            copy.heads * copy.block_tokens * copy.content * copy.kv_type.itemsize
            for copy in self.copies
        )


def runs(
    kib: int, kv: Type = Type.RAW2, wire: Type = Type.RAW2, factor: float = 1.0
) -> KernelShape:
    """Blocks that are contiguous on both sides."""
    item, nbytes = kv.itemsize, kib << 10
    row = nbytes // TOKENS
    copy = Copy(0, nbytes, 0, row, item, 1, row // item, TOKENS, 0, kv, wire, factor)
    scaled = f" ×{factor}" if factor != 1 else ""
    name = f"{kv.name} → {wire.name}{scaled}" if kv != wire else "runs"
    return KernelShape(name, copy, nbytes, compare_torch=kv == Type.BF16 and wire == Type.E4M3)


def layouts() -> list[KernelShape]:
    """Blocks whose order of heads, tokens and elements is not the wire's."""
    item = 2
    row, head = WIDTH * item, TOKENS * WIDTH * item
    block = HEADS * head
    raw = (Type.RAW2, Type.RAW2)
    hnd = Copy(0, block, head, row, item, HEADS, WIDTH, TOKENS, 0, *raw)
    nhd = hnd._replace(head_stride=row, token_stride=HEADS * row)
    column = hnd._replace(token_stride=item, content_stride=TOKENS * item)
    amx = hnd._replace(
        token_stride=2 * item, token_tile=TOKENS, token_outer=head,
        content_tile=2, content_outer=TOKENS * 2 * item,
    )  # fmt: skip
    # vLLM's on a CPU, `[block, head, token, content]`: the V of a token and head follows its K
    k = hnd._replace(block_stride=2 * block, head_stride=2 * head, token_stride=2 * row)
    return [
        KernelShape("K and V side by side", k, row, other=k._replace(base=row)),
        KernelShape("HND", hnd, head),
        KernelShape("NHD", nhd, row),
        KernelShape("NHD, 1 head of 8", nhd._replace(heads=1), row),
        KernelShape("NHD, BF16 → E4M3", _fp8(nhd), row),
        KernelShape("column-major K", column, TOKENS * item),
        KernelShape("column-major K, BF16 → E4M3", _fp8(column), TOKENS * item),
        KernelShape("AMX K", amx, 2 * item),
    ]


def _fp8(copy: Copy) -> Copy:
    return copy._replace(kv_type=Type.BF16, wire_type=Type.E4M3, factor=SCALE)


def shapes() -> list[tuple[Verb, KernelShape]]:
    """Everything that is measured."""
    same = [*(runs(kib) for kib in RUN_KIB), *layouts()]
    both: list[tuple[Verb, KernelShape]] = [(v, s) for s in same for v in ("gather", "scatter")]
    bf16, e4m3 = Type.BF16, Type.E4M3
    return [
        *both,
        ("gather", runs(32, bf16, e4m3)),
        ("gather", runs(32, bf16, e4m3, SCALE)),
        ("scatter", runs(32, bf16, e4m3, SCALE)),
        ("gather", runs(32, e4m3, bf16, SCALE)),
    ]


class HostClock:
    """Times calls that are done when they return."""

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds until it is done, and until it has returned."""
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        return seconds, seconds


class CudaClock:
    """Times what calls put on a stream, on the device: the host is ahead, as in an engine."""

    SLEEP_CYCLES = 40_000_000  # some 20 ms, in which the host puts everything on the stream

    def __init__(self, stream: int) -> None:
        self._stream = torch.cuda.ExternalStream(stream)

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds on the device, and until the call has returned."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(self.SLEEP_CYCLES)
            start.record()
            started = time.perf_counter()
            made = call()
            submitted = time.perf_counter() - started
            end.record()
        done = getattr(made, "done", None)  # launches have it, torch's calls do not
        while done is not None and not done():
            pass
        end.synchronize()
        return start.elapsed_time(end) / 1e3, submitted


class KernelArena:
    """Pool, ring and clock of one device."""

    def __init__(
        self,
        kernels: Kernels,
        device: str,
        pool_bytes: int,
        call_bytes: int,
        *,
        huge_pages: bool = False,
    ) -> None:
        self.call_bytes = call_bytes
        self._kernels = kernels
        self.on_gpu = isinstance(kernels, CudaKernels)
        self._clock: HostClock | CudaClock = HostClock()
        if isinstance(kernels, CudaKernels):
            self._clock = CudaClock(kernels.stream)
        self._rng = np.random.default_rng(0)
        # values of bf16 in the range of fp8, so that torch, which does not saturate, agrees
        some = torch.randn(min(pool_bytes, 1 << 26) // 2, dtype=torch.bfloat16, device=device)
        self._pool = torch.empty(pool_bytes, dtype=torch.uint8, device=device)
        if huge_pages:
            use_huge_pages(self._pool.data_ptr(), self._pool.nbytes)
        for piece in self._pool.split(some.nbytes):
            piece.copy_(some.view(torch.uint8)[: len(piece)])
        self._windows = max(pool_bytes // 2 // (2 * call_bytes), 1)
        # twice the bytes of a call, since a wire type may be wider
        self._ring = torch.empty(self._windows * 2 * call_bytes, dtype=torch.uint8, device=device)
        if huge_pages:
            use_huge_pages(self._ring.data_ptr(), self._ring.nbytes)
        self._ring.zero_()
        self._turn = 0

    def case(self, verb: Verb, shape: KernelShape) -> "KernelCase":
        """``shape`` over the whole pool."""
        blocks = self._pool.nbytes // shape.copy.block_stride
        copies = [
            copy._replace(base=copy.base + self._pool.data_ptr(), num_blocks=blocks)
            for copy in shape.copies
        ]
        order = self._rng.permutation(blocks).astype(np.int32)
        return KernelCase(self, verb, shape, self._kernels.prepare(copies), copies[0], order)

    def window(self) -> torch.Tensor:
        """The next part of the ring."""
        self._turn += 1
        at = self._turn % self._windows * 2 * self.call_bytes
        return self._ring[at : at + 2 * self.call_bytes]

    def blocks_of(self, copy: Copy, dtype: torch.dtype) -> torch.Tensor:
        """The pool as torch sees it, ``[block, element]``."""
        used = self._pool[: copy.num_blocks * copy.block_stride]
        return used.view(dtype).view(copy.num_blocks, -1)

    def time_memcpy(self, nbytes: int) -> float:
        """Seconds of one copy from a random place of the pool."""
        spare = (self._pool.nbytes - nbytes) // 4096
        at = int(self._rng.integers(0, spare + 1)) * 4096
        into = self.window()
        if not self.on_gpu:  # libc's; torch's goes through its iterator
            source, target = self._pool.data_ptr() + at, into.data_ptr()
            return self.timed(lambda: ctypes.memmove(target, source, nbytes))
        return self.timed(lambda: into[:nbytes].copy_(self._pool[at : at + nbytes]))

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds until ``call``, and what it started, is done."""
        return self._clock.time(call)[0]

    def submitted(self, call: Callable[[], object]) -> float:
        """Seconds until ``call`` has returned."""
        return self._clock.time(call)[1]


class KernelCase:
    """A shape prepared, and which blocks come next."""

    def __init__(
        self,
        arena: KernelArena,
        verb: Verb,
        shape: KernelShape,
        prepared: Prepared,
        copy: Copy,
        order: np.ndarray,
    ) -> None:
        self.verb, self.shape = verb, shape
        self.blocks = min(max(arena.call_bytes // shape.block_bytes, 1), len(order))
        self.nbytes = self.blocks * shape.block_bytes
        self.copy = copy
        self._arena, self._prepared, self._order = arena, prepared, order
        self._at = 0

    def next_blocks(self) -> np.ndarray:
        """Blocks for the next call: others, until all had their turn."""
        if self._at + self.blocks > len(self._order):
            self._at = 0
        self._at += self.blocks
        return self._order[self._at - self.blocks : self._at]

    def _call(self, ids: np.ndarray, wire: torch.Tensor) -> Callable[[], Any]:
        n = len(ids)
        segments = np.zeros((n, 4), dtype=np.int32)
        segments[:, 0], segments[:, 2], segments[:, 3] = ids, TOKENS, np.arange(n)
        place = (wire.data_ptr(), wire.nbytes, n)
        return lambda: self._prepared.move(self.verb, segments, *place)

    def time(self) -> float:
        """Seconds of one call on other blocks than the last."""
        return self._arena.timed(self._call(self.next_blocks(), self._arena.window()))

    def time_submit(self) -> float:
        """Seconds of the host for one call."""
        return self._arena.submitted(self._call(self.next_blocks(), self._arena.window()))

    def time_torch(self) -> float:
        """Seconds of torch's index_select, conversion and copy to the same place."""
        ids = torch.from_numpy(self.next_blocks().astype(np.int64))
        return self._arena.timed(self._by_torch(ids, self._arena.window()))

    def _by_torch(self, ids: torch.Tensor, wire: torch.Tensor) -> Callable[[], None]:
        pool = self._arena.blocks_of(self.copy, torch.bfloat16)
        ids, factor = ids.to(pool.device), self.copy.factor
        gathered = torch.empty(len(ids), pool.shape[1], dtype=pool.dtype, device=pool.device)
        wide = torch.empty_like(gathered, dtype=torch.float32) if factor != 1 else None
        made = wire[: gathered.numel()].view(torch.float8_e4m3fn).view(gathered.shape)

        def call() -> None:  # nothing is allocated, so that no page fault is timed
            torch.index_select(pool, 0, ids, out=gathered)
            if wide is None:
                made.copy_(gathered)
            else:
                made.copy_(wide.copy_(gathered).mul_(factor).clamp_(-448, 448))

        return call

    def check_torch(self) -> None:
        """Raise AssertionError unless a gather gives torch's bits."""
        ids, wire = self.next_blocks(), self._arena.window()
        self._arena.timed(self._call(ids, wire))
        used = chunk_bytes([self.copy], len(ids) * TOKENS)
        ours = wire[:used].clone()
        self._arena.timed(self._by_torch(torch.from_numpy(ids.astype(np.int64)), wire))
        assert torch.equal(ours, wire[:used]), f"{self.shape.name}: not torch's bits"
