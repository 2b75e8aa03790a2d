"""A thread of ours: one that repeats a turn until it is closed, and whose fault the engine sees.

The mover and the offloading runner are built on it. What is common to both is here: how the
thread starts, stops and fails; what a turn does and how long it waits is theirs.

* `start` runs ``turn`` again and again; tests call the owner's step instead, without a thread.
* What a turn raises ends the thread, is logged with its traceback, and is raised in the engine's
  thread by `check`.
* `close` asks the thread to stop, wakes it, and says whether it did.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(f"vllm.{__name__}")

CLOSE_S = 10.0

Fence = Callable[[], bool]
"""True once the device has finished what was submitted before the work was given."""


class Loop:
    """See the module's contract."""

    def __init__(self, name: str, turn: Callable[[], None], wake: Callable[[], None]) -> None:
        """``name``: of the thread, at most 15 characters of it are shown by ``top -H``.

        ``turn`` is what the thread repeats; it may wait. ``wake`` ends such a wait; any
        thread may call it.
        """
        self.lock = threading.Lock()
        """Guards what the engine's thread and this one share: the owner's queues and results."""
        self._name = name
        self._turn = turn
        self._wake = wake
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a turn has raised; the thread has ended then."""
        return self._fault is not None

    @property
    def stopping(self) -> bool:
        """Whether `close` has been called."""
        return self._stopping.is_set()

    def start(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Run turns on a thread until `close`; ``on_start`` is the first thing that it does."""
        self._thread = threading.Thread(
            target=self._run, args=(on_start,), name=self._name, daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what stopped the thread, if anything did."""
        if self._fault is not None:
            raise self._fault

    def close(self) -> bool:
        """Stop the thread; False if it did not stop in `CLOSE_S` seconds. Idempotent."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_S)
            if self._thread.is_alive():
                logger.error("the thread %s did not stop in %.0f s", self._name, CLOSE_S)
                return False
        return True

    def _run(self, on_start: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # so that `top -H` and `bench idle` can tell it
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self._name[:15])
        try:
            on_start()
            while not self.stopping:
                self._turn()
        except BaseException as e:
            logger.exception("the thread %s stopped; the engine will be told", self._name)
            self._fault = e
