"""That this process was asked to end, which vLLM tells a connector in no other way.

vLLM's engine core takes SIGTERM and SIGINT, refuses new requests from then on, and goes on until
it has no work: leased blocks are work. How long it may take is vLLM's ``--shutdown-timeout``.
"""

import signal
import threading
import time
from types import FrameType

asked_at: float | None = None
"""When this process was first asked to end, by time.monotonic; None: it was not."""


def watch() -> None:
    """Note when vLLM's handler of SIGTERM or SIGINT is called, in this process. Idempotent."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if callable(handler) and handler.__module__.startswith("vllm."):
            signal.signal(number, _Noting(handler))


class _Noting:
    """A handler that notes the time and calls the one that was there before."""

    def __init__(self, handler: "signal._HANDLER") -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global asked_at
        asked_at = asked_at or time.monotonic()
        assert callable(self._handler)
        self._handler(number, frame)
