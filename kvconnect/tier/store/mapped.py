"""Memory that an arena lies in: anonymous, or a file, which may be in shared memory.

* Room for a file is reserved before it is mapped: a full filesystem is an error when it is
  opened, not a SIGBUS on some later store. (Nobody may truncate it while it is mapped.)
* A file appears under its name with its header complete, or not at all.
* A writer holds a lock that the kernel lets go when it dies, however it dies; no pid is ever
  compared. Readers map without the right to write, and hold no lock.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

from kvconnect.tier.store.faults import Reason, StoreError
from kvconnect.tier.store.header import HEAD_BYTES

OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
LIVE_NAME = "{}.{}.new"  # of a file that is being made


class Mapped:
    """A piece of mapped memory. ``address`` and ``bytes`` are valid until `close`."""

    def __init__(self, memory: mmap.mmap, fd: int | None = None, new: bool = True) -> None:
        self._memory = memory
        self._fd = fd
        self.bytes = np.frombuffer(memory, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.new = new
        """Whether it holds nothing yet."""

    @property
    def inode(self) -> int | None:
        """Of the file, which may be gone from its path by now; None where there is none."""
        return None if self._fd is None else os.fstat(self._fd).st_ino

    def close(self) -> None:
        """Unmap, and let the lock go; the content of a file stays. Idempotent."""
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # somebody still looks: unmapped when they end
            self._memory.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def anonymous(nbytes: int) -> Mapped:
    """Zeros that no other process sees."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise StoreError(Reason.FULL, f"{nbytes} bytes of memory: {e.strerror}") from e
    with contextlib.suppress(OSError):  # not every kernel has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return Mapped(memory)


def create(path: Path, nbytes: int, head: bytes) -> Mapped:
    """A new file with ``head``, zeros after it, and ourselves its writer."""
    draft = path.with_name(LIVE_NAME.format(path.name, secrets.token_hex(4)))
    fd = None
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, nbytes)
        os.pwrite(fd, head, 0)
        memory = mmap.mmap(fd, nbytes)
        os.link(draft, path)  # unlike rename, fails if another was faster
    except OSError as e:
        if fd is not None:
            os.close(fd)
        raise _explained(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)
    return Mapped(memory, fd)


def open_to_write(path: Path) -> tuple[Mapped, bytes] | None:
    """An existing file and its header, locked; None if there is none (any more)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _explained(path, e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino != os.stat(path).st_ino:  # replaced before we had the lock
            os.close(fd)
            return None
        os.posix_fallocate(fd, 0, max(os.fstat(fd).st_size, 1))  # a copy may have lost some pages
        return _mapped(fd, mmap.PROT_READ | mmap.PROT_WRITE)
    except FileNotFoundError:
        os.close(fd)
        return None
    except (OSError, ValueError) as e:
        os.close(fd)
        raise _explained(path, e) from e


def open_to_read(path: Path) -> tuple[Mapped, bytes]:
    """An existing file and its header, whoever writes to it."""
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return _mapped(fd, mmap.PROT_READ)
    except (OSError, ValueError) as e:
        if fd is not None:
            os.close(fd)
        raise _explained(path, e) from e


def _mapped(fd: int, protection: int) -> tuple[Mapped, bytes]:
    memory = mmap.mmap(fd, 0, prot=protection)  # an empty file is a ValueError
    return Mapped(memory, fd, new=False), memory[:HEAD_BYTES]


def _explained(path: Path, error: OSError | ValueError) -> StoreError:
    if not isinstance(error, OSError):
        return StoreError(Reason.FOREIGN, f"{path} is empty")
    reason = Reason.FAILED
    if isinstance(error, BlockingIOError | FileExistsError):
        reason = Reason.TAKEN
    elif error.errno in OUT_OF_ROOM:
        reason = Reason.FULL
    return StoreError(reason, f"{path}: {error.strerror}")
