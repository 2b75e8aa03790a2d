"""A file with faults: a decorator over a real one, for `kvconnect.offload.store.io_threads`.

What disks do: fail, run full, end early, take their time, and, worst, say that all went well.
Faults are planned for the next operations, one each, in order; the rest go well.
"""

import enum
import errno
import math
import os
import threading
from collections import deque

from kvconnect.offload.store.io_threads import File


class DiskFault(enum.Enum):
    """What becomes of an operation."""

    NONE = "none"
    IO_ERROR = "I/O error"
    FULL = "no space left"
    SHORT = "ends early"
    """Half of the bytes, and no error."""
    LOST = "lost"
    """All is said to be well; nothing was moved."""
    FLIPPED = "flipped"
    """All is said to be well; one bit is wrong."""


class FaultyFile:
    """See the module's contract. Threads may use it; plans are made before."""

    def __init__(self, file: File) -> None:
        self.usual = DiskFault.NONE
        """Of operations that nothing was planned for."""
        self.operations = 0
        self.closed = False
        self._file = file
        self._plans: deque[DiskFault] = deque()
        self._lock = threading.Lock()
        self._gate = threading.Condition()
        self._may_pass = math.inf
        self.held = 0
        """Operations that wait for `let_go`."""

    def plan(self, *faults: DiskFault) -> None:
        """Decide about the next operations."""
        self._plans.extend(faults)

    def forget_plans(self) -> None:
        """Let operations that are yet to come go well."""
        self.usual = DiskFault.NONE
        self._plans.clear()

    def hold(self) -> None:
        """Let nothing end until `let_go`."""
        with self._gate:
            self._may_pass = 0

    def let_go(self, most: float = math.inf) -> None:
        """Let so many operations end."""
        with self._gate:
            self._may_pass += most
            self._gate.notify_all()

    def read(self, into: memoryview, offset: int) -> int:
        fault = self._next()
        if fault is DiskFault.LOST:
            return len(into)
        if fault is DiskFault.SHORT:
            return self._file.read(into[: len(into) // 2], offset)
        done = self._file.read(into, offset)
        if fault is DiskFault.FLIPPED:
            into[0] ^= 1
        return done

    def write(self, content: memoryview, offset: int) -> int:
        fault = self._next()
        if fault is DiskFault.LOST:
            return len(content)
        if fault is DiskFault.SHORT:
            return self._file.write(content[: len(content) // 2], offset)
        if fault is DiskFault.FLIPPED:
            wrong = bytearray(content)
            wrong[0] ^= 1
            return self._file.write(memoryview(wrong), offset)
        return self._file.write(content, offset)

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def _next(self) -> DiskFault:
        with self._gate:
            self.held += 1
            self._gate.wait_for(lambda: self._may_pass > 0)
            self.held -= 1
            self._may_pass -= 1
        with self._lock:
            self.operations += 1
            fault = self._plans.popleft() if self._plans else self.usual
        if fault is DiskFault.IO_ERROR:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault is DiskFault.FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fault
