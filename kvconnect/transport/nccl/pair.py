"""What NCCL works on: staging memory of the device, and pairs of ranks that send and receive.

* `Device` copies between scattered spans and dense staging buffers, on a stream of its own.
* A `RankPair` is one end of a two-rank communicator with a stream of its own, so that a peer that
  is silent keeps nobody else waiting. Moves go out in the order asked for; the other end must ask
  for their counterparts in the same order.
* A copy and a move of the same buffer are never queued one after the other: the second is
  given to the device when the first is done. So an aborted receive is not scattered.
* Nothing blocks, but what CUDA and NCCL do at the start of a pair. Aborting is done by a thread.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from kvconnect.errors import ConfigError, TransportError
from kvconnect.ops.cuda import CudaKernels, CudaLaunch
from kvconnect.transport.nccl.library import Buffer, Nccl

COPY_CTAS = 8  # of a gather or scatter: the model computes meanwhile
WIDTHS = (1, 2, 4, 8, 16)  # that the copy kernels come in


class Device:
    """One GPU: its copies, and ``asking`` and ``serving`` buffers, apart so that no two ranks
    that ask each other can take all and then wait.
    """

    def __init__(self, index: int, buffers: int, buffer_bytes: int, spans: int) -> None:
        self.index, self._bytes = index, buffer_bytes
        self._kernels = CudaKernels(index, COPY_CTAS)
        try:
            self._memory = self._kernels.alloc(2 * buffers * buffer_bytes, pinned=False)
        except TransportError as e:
            self._kernels.close()
            raise ConfigError(f"NCCL's staging: {e}; is less of the GPU's memory for vLLM?") from e
        first = [self._memory + i * buffer_bytes for i in range(2 * buffers)]
        self.asking, self.serving = first[:buffers], first[buffers:]
        self._prepare(2 * buffers, spans)

    def gather(self, addresses: np.ndarray, nbytes: np.ndarray, buffer: int) -> CudaLaunch:
        """Copy spans, which must be this device's, one after the other into a buffer."""
        dense = buffer + np.cumsum(nbytes) - nbytes
        return self._kernels.copy_runs(dense, addresses, nbytes)

    def scatter(self, addresses: np.ndarray, nbytes: np.ndarray, buffer: int) -> CudaLaunch:
        """Copy from ``buffer``, where they lie one after the other, to ``addresses``."""
        dense = buffer + np.cumsum(nbytes) - nbytes
        return self._kernels.copy_runs(addresses, dense, nbytes)

    def drained(self) -> Generator[None]:
        """Wait until all copies so far are done, or the device has failed for good."""
        with contextlib.suppress(TransportError):
            end = _marker(self._kernels)
            while not end.done():
                yield

    def close(self, free: bool) -> None:
        """When all copies are done. ``free`` the buffers, unless NCCL may still have them."""
        if free:
            self._kernels.free(self._memory, pinned=False)
        self._kernels.close()

    def _prepare(self, launches: int, spans: int) -> None:
        """Make what kernels and launches need: CUDA may wait for NCCL's kernels to do it later."""
        buffer = np.full(spans, self._memory, np.int64)
        held = []
        for i in range(launches):
            width = WIDTHS[i % len(WIDTHS)]
            held.append(self._kernels.copy_runs(buffer, buffer, np.full(spans, width, np.int64)))
        for launch in held:
            while not launch.done():
                pass


class Move:
    """Sending or receiving one buffer."""

    def __init__(self, send: Buffer | None, receive: Buffer | None) -> None:
        self.send, self.receive = send, receive
        self.done = False
        """Whether the buffer is sent or received. Never if the pair is aborted."""


class _Moving(NamedTuple):
    move: Move
    end: CudaLaunch


class RankPair:
    """One end of a two-rank communicator. Methods raise TransportError if it has failed."""

    def __init__(self, nccl: Nccl, device: Device, unique_id: bytes, rank: int, ctas: int) -> None:
        try:
            self._kernels = CudaKernels(device.index)  # for a stream, and to see how far that is
        except ConfigError as e:
            raise TransportError(str(e)) from e
        self._peer = 1 - rank
        self._waiting: deque[Move] = deque()
        self._begun: Move | None = None
        self._moving: deque[_Moving] = deque()
        self._aborting: threading.Thread | None = None
        self.up = False
        """Whether both ends have met."""
        try:
            with self._kernels.current():
                self._communicator = nccl.communicator(unique_id, rank, 2, ctas or None)
        except TransportError:
            self._kernels.close()
            raise

    def send(self, address: int, nbytes: int) -> Move:
        """Send from a buffer that is left alone until done."""
        return self._queue(Move((address, nbytes), None))

    def receive(self, address: int, nbytes: int) -> Move:
        """Receive into a buffer."""
        return self._queue(Move(None, (address, nbytes)))

    def progress(self) -> bool:
        """Begin and end moves; whether any ended, or the pair came up."""
        if not self._communicator.ready():
            return False
        came_up, self.up = not self.up, True
        if self._begun is not None:  # NCCL has put it into the stream: what is next ends after it
            self._moving.append(_Moving(self._begun, _marker(self._kernels)))
            self._begun = None
        ended = 0
        while self._moving and self._moving[0].end.done():
            self._moving.popleft().move.done = True
            ended += 1
        if self._waiting:
            self._begun = self._waiting.popleft()
            with self._kernels.current():
                self._communicator.move(
                    self._kernels.stream, self._peer, self._begun.send, self._begun.receive
                )
        return came_up or ended > 0

    def abort(self) -> None:
        """End everything, on a thread: buffers of moves that are not done are free when `gone`."""
        if self._aborting is None:
            self._aborting = threading.Thread(target=self._abort, daemon=True, name="nccl-abort")
            self._aborting.start()

    def _abort(self) -> None:
        with contextlib.suppress(TransportError):  # what cannot be set is aborted too
            # NCCL puts the thread's device back, and would make a context on the first GPU
            self._kernels.set_device()
        self._communicator.abort()

    def gone(self, wait_s: float = 0.0) -> bool:
        """Whether an aborted pair has left the device."""
        assert self._aborting is not None, "gone is asked of an aborted pair"
        self._aborting.join(wait_s)
        if self._aborting.is_alive():
            return False
        self._kernels.close()
        return True

    def _queue(self, move: Move) -> Move:
        self._waiting.append(move)
        return move


def _marker(kernels: CudaKernels) -> CudaLaunch:
    """Done when all is that is in the stream now."""
    nothing = np.empty(0, np.uint64)
    return kernels.copy_runs(nothing, nothing, nothing)
