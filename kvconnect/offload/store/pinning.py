"""Memory made known to a device piece by piece, on threads, so that nobody waits for all of it.

* The first piece is pinned before `start` returns, and its failure raised: a limit on locked
  memory is an error at the start. The rest follows from `go_on`; what fails there is logged, and
  the memory from there on stays unused.
* `go_on` is called at the engine's first step and not before. While vLLM captures its graphs, a
  call of another thread that registers memory fails and spoils the capture (vllm#46933); once
  steps run, nothing is captured any more. To pin everything in `start` would be right as well,
  and was rejected: tens of GB take many seconds, in which the engine serves nobody.
* `ready` is how much is pinned, from the start on without a gap.
* What was pinned is given back by `close`, before its memory is unmapped: else the device would
  refuse the next memory at the same addresses.
* Knows no CUDA: ``register`` takes an address and bytes, ``unregister`` an address. Both return 0
  or an error code, and are called from any thread.
"""

import logging
import threading
from collections.abc import Callable

from kvconnect.errors import Reason, StoreError

logger = logging.getLogger(f"vllm.{__name__}")

PIECE_BYTES = 256 << 20
THREADS = 4  # registering is spent in the kernel, page by page; it scales to about so many

Register = Callable[[int, int], int]
Unregister = Callable[[int], int]


class Pinning:
    """See the module's contract."""

    def __init__(
        self,
        address: int,
        nbytes: int,
        register: Register,
        unregister: Unregister,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        starts = range(0, nbytes, piece_bytes)
        self._pieces = [(at, min(piece_bytes, nbytes - at)) for at in starts]
        self._address = address
        self._register = register
        self._unregister = unregister
        self._lock = threading.Lock()  # guards the three below
        self._next = 0
        self._pinned: set[int] = set()
        self._stopping = False
        self._ready = 0  # of pieces
        self._going = False
        self._threads: list[threading.Thread] = []

    @property
    def ready(self) -> int:
        """Bytes from the start on that the device can use."""
        with self._lock:
            while self._ready in self._pinned:
                self._ready += 1
        return sum(nbytes for _, nbytes in self._pieces[: self._ready])

    @property
    def running(self) -> int:
        """How many threads pin at this moment."""
        return sum(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Pin the first piece, in the caller's thread; raises StoreError."""
        if code := self._pin_next():
            nbytes = self._pieces[0][1]
            raise StoreError(
                Reason.FAILED,
                f"{nbytes} bytes of host memory cannot be pinned (CUDA error {code}); "
                "raise the limit on locked memory, or lower cpu_bytes_to_use",
            )

    def go_on(self, threads: int = THREADS) -> None:
        """Pin the other pieces on threads. Does nothing when it is called again."""
        if self._going or self._stopping:
            return
        self._going = True
        for _ in range(min(threads, len(self._pieces) - 1)):
            thread = threading.Thread(target=self._run, name="kvconnect-pin", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Pin nothing more, and give back what is pinned. Idempotent."""
        with self._lock:
            self._stopping = True
        for thread in self._threads:
            thread.join()
        self._threads = []
        with self._lock:
            pinned, self._pinned, self._ready = self._pinned, set(), 0
        for number in sorted(pinned):
            address = self._address + self._pieces[number][0]
            if code := self._unregister(address):
                logger.warning(
                    "kvconnect: host memory at %#x cannot be unpinned (CUDA error %d)",
                    address,
                    code,
                )

    def _run(self) -> None:
        while (code := self._pin_next()) == 0:
            pass
        if code is not None:
            logger.error(
                "kvconnect: only %.2f GB of host memory could be pinned (CUDA error %d); the rest "
                "stays unused; raise the limit on locked memory, or lower cpu_bytes_to_use",
                self.ready / 1e9,
                code,
            )

    def _pin_next(self) -> int | None:
        """The register's answer; None if there is nothing left."""
        with self._lock:
            number = self._next
            if self._stopping or number == len(self._pieces):
                return None
            self._next += 1
        at, nbytes = self._pieces[number]
        code = self._register(self._address + at, nbytes)
        with self._lock:
            if code:
                self._stopping = True
            else:
                self._pinned.add(number)
        return code
