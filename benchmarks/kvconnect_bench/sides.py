"""The two processes of ``kvconnect bench transport``: a supplier and a reader, no vLLM.

Each has a cache in plain memory, a control channel, and a mover on its thread, as a vLLM worker
has; the reader has one mover per mode. The parent gives commands over a pipe, one at a time,
and ends both processes; a side whose parent is gone ends by itself.
"""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, get_args

import numpy as np

from kvconnect.config import Mode, Settings
from kvconnect.control.channel import ZmqChannel
from kvconnect.errors import KvConnectError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.lease import Terms
from kvconnect.mover import Mover
from kvconnect.ops import load
from kvconnect.ops.pages import use_huge_pages
from kvconnect.orders import EngineAddresses, Fetch, Grant, Source
from kvconnect.staging import Staging, staging_slot_bytes
from kvconnect.transport.base import Op, Transport, Work
from kvconnect.transport.registry import make_transport
from kvconnect_bench.caches import Cache, Model

HOST = "127.0.0.1"
LAYERS, BLOCK_TOKENS, ITEM_BYTES = 32, 16, 2
HEAD_ELEMENTS = 256
"""Elements of one head and token, K and V together."""
SEED = 1
LEASE_S, LOOK_S, END_S = 120.0, 0.0002, 5.0
WITH_READS = {"UCX_PROTO_EMULATION_ENABLE": "y"}  # which `transport.nixl` has not over TCP, else
MODES: tuple[Mode, ...] = get_args(Mode)
WIRES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    # UCX's shared memory needs TCP beside it, for control messages that notice a dead peer
    "nixl": {"shm": {"UCX_TLS": "shm,tcp,self"}, "tcp": {"UCX_TLS": "tcp,self", **WITH_READS}},
    "ucx": {"shm": {"UCX_TLS": "shm,tcp,self"}, "tcp": {"UCX_TLS": "tcp,self"}},
    "mooncake": {"tcp": {}},
}
"""Transport → its wires → the environment that makes both sides use one."""


class SideError(KvConnectError):
    """A side of the benchmark failed, or did not answer in time."""


@dataclass(frozen=True)
class TransferCase:
    """What is moved, and over which transport and wire."""

    transport: str
    wire: str
    row_bytes: int
    total_bytes: int
    staging_bytes: int

    @property
    def model(self) -> Model:
        """One whose block of a layer is a row: heads of 128 elements, bf16, or part of one."""
        a_head = BLOCK_TOKENS * HEAD_ELEMENTS * ITEM_BYTES
        heads = max(1, self.row_bytes // a_head)
        content = self.row_bytes // (heads * BLOCK_TOKENS * ITEM_BYTES)
        return Model(LAYERS, heads, BLOCK_TOKENS, content, dtype="bfloat16")

    def problem(self) -> str:
        """Why this cannot be measured; empty if it can."""
        model = self.model
        exact = model.heads * model.content * BLOCK_TOKENS * ITEM_BYTES == self.row_bytes
        whole = self.total_bytes % (self.row_bytes * LAYERS) == 0 and self.blocks
        if exact and whole:
            return ""
        return (
            f"{self.total_bytes} bytes in rows of {self.row_bytes}: rows must be a power of two "
            f"from 1 KiB on, and fill {LAYERS} layers"
        )

    @property
    def blocks(self) -> int:
        """Blocks of the prompt."""
        return self.total_bytes // (self.row_bytes * LAYERS)

    def table(self, side: int) -> list[int]:
        """The prompt's blocks: every other one of a pool twice as large, in random order."""
        pool = np.random.default_rng(side).permutation(2 * self.blocks)
        return [int(block) for block in pool[: self.blocks]]


class Fetched(NamedTuple):
    """How a fetch ended."""

    seconds: float
    descriptors: int
    staged: bool
    error: str


class SideProcess:
    """A side as its parent sees it."""

    def __init__(self, side: "type[ProducerSide] | type[ConsumerSide]", case: TransferCase) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = side.__name__
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_run, args=(side, case, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def tell(self, command: str, *arguments: Any) -> None:
        """Give a command; `answer` waits for what comes of it."""
        self._pipe.send((command, arguments))

    def answer(self, timeout_s: float) -> Any:
        """What the last command returned; raises SideError."""
        if not self._pipe.poll(timeout_s):
            raise SideError(f"the {self._name} did not answer within {timeout_s:g} s")
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(END_S)
            raise SideError(
                f"the {self._name} ended with status {self._process.exitcode}"
            ) from None
        if error:
            raise SideError(f"the {self._name}: {error}")
        return answer

    def ask(self, command: str, *arguments: Any, timeout_s: float) -> Any:
        """`tell`, then `answer`."""
        self.tell(command, *arguments)
        return self.answer(timeout_s)

    def end(self) -> None:
        """Let it end; then make it."""
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _run(
    side: "type[ProducerSide] | type[ConsumerSide]", case: TransferCase, pipe: Connection
) -> None:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.update(WIRES[case.transport][case.wire])  # before its library loads
    made = side(case, pipe)
    try:
        while True:
            command, arguments = pipe.recv()
            try:
                pipe.send(("", getattr(made, command)(*arguments)))
            except Exception as e:  # sent to the parent, which ends the run
                pipe.send((f"{type(e).__name__}: {e}", None))
    except (EOFError, ConnectionError):
        return
    finally:
        made.close()


class _TransferSide:
    def __init__(self, case: TransferCase, pipe: Connection, seed: int) -> None:
        self._case, self._pipe = case, pipe
        self.cache = Cache(case.model, 2 * case.blocks, seed=seed)
        self._plain = np.zeros(case.total_bytes, dtype=np.uint8)  # for the ceilings
        address = int(self._plain.ctypes.data)
        self._raw = self._make(Region(address, case.total_bytes))
        row = np.array([[address, case.total_bytes, case.total_bytes, 1]], dtype=np.int64)
        self.plain_table = RowTable(row, np.zeros(1, dtype=np.int64), "DRAM", 0)
        self._arenas: list[np.ndarray] = []
        self.movers: dict[Mode, Mover] = {}

    def _make(self, *regions: Region) -> Transport:
        options = {"mooncake_protocol": "tcp"} if self._case.transport == "mooncake" else {}
        return make_transport(self._case.transport, regions, HOST, options)

    def add_mover(self, mode: Mode) -> Mover:
        """A mover over our cache, running."""
        size = self._case.staging_bytes
        arena = np.zeros(size, dtype=np.uint8)
        address = int(arena.ctypes.data)
        use_huge_pages(address, size)  # as the connector's worker does
        self._arenas.append(arena)
        staging = Staging(Region(address, size), staging_slot_bytes(size))
        cached = () if mode == "staged" else self.cache.shard.regions
        transport = self._make(*cached, staging.region)
        settings = Settings(
            0,
            1,
            {"model": "bench"},
            self._case.transport,
            mode=mode,
            handshake_timeout_s=LEASE_S,  # a machine that is busy is slow, and no fault
            load_timeout_s=LEASE_S,
        )
        channel = ZmqChannel(HOST)
        mover = Mover(
            settings, self.cache.shard, transport, channel, staging=staging, kernels=load("cpu")
        )
        mover.put([EngineAddresses((mover.address,))])
        mover.start()
        self.movers[mode] = mover
        return mover

    def close(self) -> None:
        """End all threads and transports."""
        for mover in self.movers.values():
            mover.close()
        self._raw.close()


class ProducerSide(_TransferSide):
    """Lends the same blocks again and again."""

    def __init__(self, case: TransferCase, pipe: Connection) -> None:
        super().__init__(case, pipe, seed=1)
        self._mover = self.add_mover("auto")
        self.blocks = case.table(1)
        self.cache.fill(self.blocks, SEED)

    def lend(self, name: str) -> tuple[Source, Terms]:
        """A lease of all blocks."""
        tokens = self._case.blocks * BLOCK_TOKENS
        terms = Terms(name, name, (tuple(self.blocks),), tokens, b"digest", LEASE_S)
        self._mover.put([Grant(terms)])
        return Source((self._mover.address,), name, name, LEASE_S), terms

    def freed(self, name: str, timeout_s: float) -> bool:
        """Whether a lease ends in time."""
        deadline = time.monotonic() + timeout_s
        while name not in self._mover.take().sent:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def hello(self) -> tuple[bytes, RowTable]:
        """The hello and the rows of the memory that the ceiling is read from."""
        return self._raw.hello(), self.plain_table

    def serve(self) -> None:
        """Let `ConsumerSide.contiguous` read, until the next command comes."""
        while not self._pipe.poll():
            self._raw.poll()

    def stop(self) -> None:
        """A command that does nothing: that it came ends `serve`."""


class ConsumerSide(_TransferSide):
    """Fetches into its own blocks, in each mode."""

    def __init__(self, case: TransferCase, pipe: Connection) -> None:
        super().__init__(case, pipe, seed=2)
        self._table = tuple(enumerate(case.table(2)))
        # whole memory, so that what must not be touched is compared too
        self.wiped = self.cache.memory.copy()
        self.cache.fill([block for _, block in self._table], SEED)
        self._right = self.cache.memory.copy()
        for mode in MODES:
            self.add_mover(mode)

    def fetch(self, mode: Mode, source: Source, terms: Terms, timeout_s: float) -> Fetched:
        """Fill the blocks; from the order to the outcome."""
        self.cache.memory[:] = self.wiped
        mover, name = self.movers[mode], terms.request_id
        started = time.perf_counter()
        mover.put([Fetch(name, source, (self._table,), terms.tokens, terms.digest)])
        while name not in (outcome := mover.take()).received:
            if time.perf_counter() - started > timeout_s:
                return Fetched(timeout_s, 0, False, f"no outcome within {timeout_s:g} s")
            time.sleep(LOOK_S)
        seconds, stats = time.perf_counter() - started, mover.take_stats() or {}
        error = outcome.failed.get(name, "")
        if not error and not np.array_equal(self.cache.memory, self._right):
            error = "memory is not what the supplier's blocks make it"
        descriptors = int(sum(stats.get("num_descriptors", ())))
        return Fetched(seconds, descriptors, bool(stats.get("num_staged_transfers")), error)

    def contiguous(self, hello: bytes, theirs: RowTable, timeout_s: float) -> float:
        """Seconds for the same bytes as one row."""
        self._raw.add_peer("supplier", hello)
        index = np.zeros(1, dtype=np.int32)
        size = self._case.total_bytes
        started = time.perf_counter()
        self._raw.submit(Work(Op.READ, "supplier", self.plain_table, index, theirs, index, size))
        while not (ended := self._raw.poll()):
            if time.perf_counter() - started > timeout_s:
                raise SideError(f"one row of {size} bytes was not read within {timeout_s:g} s")
        if ended[0].error:
            raise SideError(f"one row of {size} bytes: {ended[0].error}")
        return time.perf_counter() - started

    def memcpy(self) -> float:
        """Seconds for the same bytes by memcpy, one thread."""
        size = self._case.total_bytes
        source = self.cache.memory.ctypes.data
        started = time.perf_counter()
        ctypes.memmove(self._plain.ctypes.data, source, size)
        return time.perf_counter() - started
