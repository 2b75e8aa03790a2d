"""What an arena lies in: anonymous memory, a mapped file (which may be in shared memory), or a file
that only its headers are kept in memory of.

* Room for a file is reserved when it is made: a full filesystem is an error then, not a SIGBUS
  or a failed write on some later store.
* A file appears under its name with its header complete, or not at all.
* A writer holds a lock that the kernel lets go when it dies, however it dies; no pid is ever
  compared. Readers map without the right to write, and hold no lock.
* A mapped file must not be truncated while it is mapped. A file that is not mapped may be.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.store import numa
from kvconnect.offload.store.header import HEAD_BYTES, ArenaSpec

OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
DRAFT_NAME = "{}.{}.new"  # of a file that is being made


class Backing(Protocol):
    """Where an arena is. ``bytes`` holds at least its header and the table of slots'."""

    bytes: np.ndarray
    new: bool
    """Whether it holds nothing yet."""
    nbytes: int
    """As long as it really is."""
    inode: int | None
    fd: int
    """The open file; -1 for memory that is in none, and once closed."""

    def flush(self, offset: int, nbytes: int) -> None:
        """Bytes of the table were changed; raises OSError if that cannot be kept."""

    def reload(self, offset: int, nbytes: int) -> None:
        """Another process may have changed bytes of the table."""

    def close(self) -> None:
        """Give it up, and let the lock go; the content of a file stays. Idempotent."""


Wrap = Callable[[int, bool, bool], Backing]
"""(descriptor, to write?, new?) → the backing, which owns the descriptor from then on."""


class MappedBacking:
    """Memory, all of it, wished on ``nodes`` if it is new. ``bytes`` is valid until `close`."""

    def __init__(
        self, memory: mmap.mmap, fd: int = -1, new: bool = True, nodes: numa.Nodes = ()
    ) -> None:
        self._memory = memory
        self.fd = fd
        self.bytes = np.frombuffer(memory, np.uint8)
        self.nbytes = self.bytes.nbytes
        self.new = new
        self.inode = None if fd < 0 else os.fstat(fd).st_ino
        if new:  # what somebody has filled stays where it is
            numa.prefer(self.bytes, nodes)

    def flush(self, offset: int, nbytes: int) -> None:
        """Nothing to do."""

    def reload(self, offset: int, nbytes: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # somebody still looks: unmapped when they end
            self._memory.close()
        if self.fd >= 0:
            _let_go(self.fd)
            self.fd = -1


def anonymous(nbytes: int, nodes: numa.Nodes = ()) -> MappedBacking:
    """Zeros that no other process sees."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise StoreError(Reason.FULL, f"{nbytes} bytes of memory: {e.strerror}") from e
    return MappedBacking(_in_huge_pages(memory), nodes=nodes)


def _in_huge_pages(memory: mmap.mmap) -> mmap.mmap:
    """Where the kernel has them, of files in shared memory too."""
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def nameless(nbytes: int, nodes: numa.Nodes = ()) -> MappedBacking:
    """Zeros that other processes of ours can map, by way of /proc, as long as we live."""
    fd = -1
    try:
        fd = os.memfd_create("kvconnect", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)  # not reserved: whoever asks for too much is ended at once then
        return mapped(fd, True, True, nodes)
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        raise StoreError(Reason.FULL, f"{nbytes} bytes of shared memory: {e.strerror}") from e


def mapped(fd: int, to_write: bool, new: bool, nodes: numa.Nodes = ()) -> MappedBacking:
    """All of a file as memory."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if to_write else 0)
    memory = mmap.mmap(fd, 0, prot=protection)  # empty: ValueError
    return MappedBacking(_in_huge_pages(memory), fd, new, nodes)


class FileBacking:
    """A file of which the header and the table are in memory of our own."""

    def __init__(self, fd: int, to_write: bool, new: bool) -> None:
        self.fd = fd
        self.new = new
        self.to_write = to_write
        found = os.fstat(fd)
        self.nbytes = found.st_size
        self.inode: int | None = found.st_ino
        self.bytes = np.zeros(min(HEAD_BYTES, self.nbytes), np.uint8)
        self._read(0, len(self.bytes))

    def extend(self, nbytes: int) -> None:
        """Keep so much from the start in memory."""
        self.bytes = np.zeros(nbytes, np.uint8)
        self._read(0, nbytes)

    def flush(self, offset: int, nbytes: int) -> None:
        if not self.to_write:
            raise ValueError("the file is read-only")
        if os.pwrite(self.fd, self.bytes[offset : offset + nbytes].tobytes(), offset) != nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reload(self, offset: int, nbytes: int) -> None:
        if not self.to_write:  # a writer knows best, whatever became of the file
            self._read(offset, nbytes)

    def _read(self, offset: int, nbytes: int) -> None:
        """What cannot be read is zeros, which no check fits."""
        raw = b""
        with contextlib.suppress(OSError):
            raw = os.pread(self.fd, nbytes, offset)
        self.bytes[offset : offset + nbytes] = np.frombuffer(raw.ljust(nbytes, b"\0"), np.uint8)

    def close(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        if self.fd >= 0:
            _let_go(self.fd)
            self.fd = -1


def _let_go(fd: int) -> None:
    """Unlock as well as close: a mapping that somebody still looks at has a duplicate of it."""
    _used(fd)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _used(fd: int) -> None:
    """Note in the file that it was in use until now: what is written to a mapping does not."""
    with contextlib.suppress(OSError):
        os.utime(fd)


def create(path: Path, spec: ArenaSpec, head: bytes, wrap: Wrap) -> Backing:
    """A new file with ``head``, zeros after it, and ourselves its writer."""
    draft = path.with_name(DRAFT_NAME.format(path.name, secrets.token_hex(4)))
    fd = -1
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, spec.nbytes)
        os.pwrite(fd, head, 0)
        backing = wrap(fd, True, True)  # before it has pages: it may say where they shall lie
        try:
            os.posix_fallocate(fd, 0, spec.nbytes)
            os.link(draft, path)  # unlike rename, fails if another was faster
        except OSError:
            fd = -1
            backing.close()
            raise
        return backing
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        raise explained(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def open_to_write(path: Path, wrap: Wrap) -> Backing | None:
    """An existing file, locked; None if there is none (any more)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise explained(path, e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino != os.stat(path).st_ino:  # replaced before we had the lock
            os.close(fd)
            return None
        os.posix_fallocate(fd, 0, max(os.fstat(fd).st_size, 1))  # a copy may have lost some pages
        _used(fd)
        return wrap(fd, True, False)
    except FileNotFoundError:
        os.close(fd)
        return None
    except OSError as e:
        os.close(fd)
        raise explained(path, e) from e


def open_to_read(path: Path, wrap: Wrap) -> Backing:
    """An existing file, whoever writes to it."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return wrap(fd, False, False)
    except (OSError, ValueError) as e:
        if fd >= 0:
            os.close(fd)
        raise explained(path, e) from e


def explained(path: Path, error: OSError | ValueError) -> StoreError:
    """``error`` as a StoreError."""
    if not isinstance(error, OSError):
        return StoreError(Reason.FOREIGN, f"{path} is empty")
    reason = Reason.FAILED
    if isinstance(error, BlockingIOError | FileExistsError):
        reason = Reason.TAKEN
    elif error.errno in OUT_OF_ROOM:
        reason = Reason.FULL
    return StoreError(reason, f"{path}: {error.strerror}")
