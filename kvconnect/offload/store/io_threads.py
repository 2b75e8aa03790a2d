"""Threads that read and write pieces of files, so that nobody who asks has to wait.

* The queue is bounded in jobs: where there is no `room` the caller goes without (back-pressure).
* Each job ends once, in `poll`; until then its memory is the threads'.
* Direct I/O where the filesystem permits, so that KV does not push everything else out of the
  page cache; buffered elsewhere, and where a piece is not aligned.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvconnect.offload.jobs import JobDone
from kvconnect.offload.store.header import PAGE_BYTES

logger = logging.getLogger(f"vllm.{__name__}")


class File(Protocol):
    """What `IoThreads` needs of a file; `SystemFile` is the real one, tests have others."""

    def read(self, into: memoryview, offset: int) -> int:
        """Fill ``into`` as far as the file goes; returns how many bytes. Raises OSError."""

    def write(self, content: memoryview, offset: int) -> int:
        """Write; returns how many bytes. Raises OSError."""

    def close(self) -> None:
        """Idempotent."""


class SystemFile:
    """A file of the operating system, by a descriptor that stays its owner's."""

    def __init__(self, fd: int, to_write: bool = True) -> None:
        self._fd = os.dup(fd)
        self._direct = -1
        with contextlib.suppress(OSError):  # EINVAL: this filesystem has none
            access = os.O_RDWR if to_write else os.O_RDONLY
            self._direct = os.open(f"/proc/self/fd/{fd}", access | os.O_DIRECT | os.O_CLOEXEC)

    def read(self, into: memoryview, offset: int) -> int:
        done = 0
        while done < len(into):
            fd = self._for(into[done:], offset + done)
            got = os.preadv(fd, [into[done:]], offset + done)
            if not got:
                break
            done += got
        return done

    def write(self, content: memoryview, offset: int) -> int:
        done = 0
        while done < len(content):
            fd = self._for(content[done:], offset + done)
            done += os.pwritev(fd, [content[done:]], offset + done)
        return done

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def _for(self, piece: memoryview, offset: int) -> int:
        if self._direct < 0 or (offset | len(piece)) % PAGE_BYTES:
            return self._fd
        address = np.frombuffer(piece, np.uint8).ctypes.data
        return self._fd if address % PAGE_BYTES else self._direct


@dataclass
class _Job:
    number: int
    run: Callable[[memoryview, int], int]
    memory: memoryview
    offset: int


@dataclass
class _Shared:
    jobs: "queue.SimpleQueue[_Job | None]" = field(default_factory=queue.SimpleQueue)
    finished: "queue.SimpleQueue[JobDone]" = field(default_factory=queue.SimpleQueue)
    taken: dict[int, float] = field(default_factory=dict)  # job that runs → since then


class IoThreads:
    """See the module's contract. One thread submits and polls."""

    def __init__(
        self, threads: int = 2, most_jobs: int = 32, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most_jobs
        self._clock = clock
        self._running = 0
        self._numbers = 0
        self._shared = _Shared()
        self._threads = [
            threading.Thread(
                target=_work, args=(self._shared, clock), name="kvconnect-disk", daemon=True
            )
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def room(self) -> int:
        """How many jobs would be taken now."""
        return self._most - self._running if self._threads else 0

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""
        return self._running > 0

    @property
    def longest_s(self) -> float:
        """For how long a file has kept a thread now: the longest."""
        now = self._clock()
        return now - min(list(self._shared.taken.values()), default=now)

    def read(self, file: File, into: memoryview, offset: int) -> int:
        """Start to fill ``into``; the job's number. Only where there is `room`."""
        return self._submit(file.read, into, offset)

    def write(self, file: File, content: memoryview, offset: int) -> int:
        """Start to write ``content``; the job's number. Only where there is `room`."""
        return self._submit(file.write, content, offset)

    def poll(self) -> list[JobDone]:
        """Jobs that ended since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._shared.finished.get_nowait())
        self._running -= len(found)
        return found

    def close(self) -> None:
        """Wait for what runs, then stop the threads. Idempotent."""
        for _ in self._threads:
            self._shared.jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _submit(
        self, run: Callable[[memoryview, int], int], memory: memoryview, offset: int
    ) -> int:
        assert self.room > 0
        self._numbers += 1
        self._running += 1
        self._shared.jobs.put(_Job(self._numbers, run, memory, offset))
        return self._numbers


def _work(shared: _Shared, clock: Callable[[], float]) -> None:
    while (job := shared.jobs.get()) is not None:
        shared.taken[job.number] = clock()
        start = time.perf_counter()
        error, done = "", 0
        try:
            done = job.run(job.memory, job.offset)
            if done != len(job.memory):
                error = f"{done} of {len(job.memory)} bytes"
        except OSError as e:
            error = str(e)
        except Exception as e:  # ends this job; the thread goes on with the others
            logger.exception("kvconnect: a thread for files failed")
            error = f"{type(e).__name__}: {e}"
        seconds = time.perf_counter() - start
        number, job = job.number, None  # the memory is its owner's again before `poll` says so
        del shared.taken[number]
        shared.finished.put(JobDone(number, error, done, seconds))
