"""Slots in memory, each with a header that is right at every instant.

* One writer; any number of readers, in other processes, that cannot write. A slot belongs to
  the writer of its arena. Engines that share have an arena each, and read each other's.
* A slot goes FREE → FILLING → HELD → FREE. Its payload changes only between `begin` and
  `commit`, while its header is invalid: a process killed at any instant, a power cut, and a
  reader that was too slow all find either what was committed, or nothing.
* Stores of one thread reach other threads in program order on x86; elsewhere and after a power
  cut they may not, and then the payload's digest tells.
* Headers are in memory or, of a file that is not mapped, written through; `begin` and `commit`
  raise OSError if that fails, and then the slot is still being filled, or was not begun.
* Not thread-safe. Knows no policy: who calls `begin` says which slot.

Why it is so, and what was rejected:

* Headers lie in one table and not before each payload: 100,000 of them are found again by one read
  of 12.8 MB, where a header in each slot would be as many page faults, or reads of a disk.
* A header is invalid while its payload changes, and no journal or checksum of the whole payload is
  written: a crash costs the slots that were being filled. A journal would double the writes, and
  a checksum at the commit a pass over the bytes that the kernels have already summed.
* One writer and no locks between processes: engines that share have an arena each. A lock in
  shared memory would be held for ever by an engine that is killed while it holds it.
* Readers compare the header before and after (`still`) instead of pinning a slot: a pin by another
  process could not be taken back when that process dies.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.store import backing, header
from kvconnect.offload.store.header import (
    ARENA_MAGIC,
    FILLING,
    FORMAT,
    FREE,
    HEAD_BYTES,
    HELD,
    SLOT,
    SLOT_MAGIC,
    ArenaSpec,
)
from kvconnect.offload.store.numa import Nodes

ATTEMPTS = 3  # to open a file that others create and replace meanwhile


class Written(NamedTuple):
    """A payload that is written: what its slot is to hold."""

    slot: int
    key: bytes
    group: int
    tokens: int
    nbytes: int
    digest: int


class SlotEntry(NamedTuple):
    """What a held slot's header says."""

    slot: int
    key: bytes
    group: int
    tokens: int
    nbytes: int
    digest: int
    generation: int
    order: int

    def copied_to(self, slot: int) -> Written:
        """The same payload in another slot, perhaps of another arena."""
        return Written(slot, *self[1:6])


class ArenaScan(NamedTuple):
    """What an arena holds. ``entries`` in the order in which they were committed."""

    entries: list[SlotEntry]
    discarded: list[int]
    """Slots that say neither truthfully that they are held, nor that they are free."""


class Arena:
    """See the module's contract; made by `make`, `attach` or `look`."""

    def __init__(self, spec: ArenaSpec, opened: backing.Backing, identity: bytes) -> None:
        self.spec = spec
        self.identity = identity
        self.backing = opened
        self.new = opened.new
        """Whether it was made just now, empty."""
        self._seed = header.seed_of(spec.fingerprint)
        if isinstance(opened, backing.FileBacking):
            opened.extend(spec.payload_offset)
        table = opened.bytes[HEAD_BYTES : HEAD_BYTES + spec.slots * SLOT.itemsize]
        self._table: np.ndarray = table.view(SLOT)
        self._first, self._stride = spec.payload_offset, spec.stride
        self._readers = 0
        self._closing = False
        rows, held = self._snapshot()
        self._order = int(rows["order"][held].max(initial=0))

    # -- the writer ----------------------------------------------------------------------------

    def begin(self, slot: int) -> None:
        """The slot's content is invalid from here on, and may be written."""
        row = self._table[slot : slot + 1]
        row["check"] = 0
        row["state"] = FILLING
        row["generation"] += 1
        self._flush(slot)

    def commit(self, written: Sequence[Written]) -> list[SlotEntry]:
        """Payloads are written; their slots hold their keys from here on.

        Together, for a header's check alone costs as much as those of many.
        """
        slots = np.array([one.slot for one in written])
        live = self._table[slots]  # a copy
        assert (live["state"] == FILLING).all()
        entries, said = [], []
        for one, generation in zip(written, live["generation"].tolist(), strict=True):
            assert one.nbytes <= self.spec.slot_bytes
            self._order += 1
            entries.append(SlotEntry(*one, generation, self._order))
            what = (HELD, one.group, one.tokens, generation, self._order, one.nbytes, one.digest)
            key, spare = np.frombuffer(one.key, np.uint8), (0,) * 5
            said.append((SLOT_MAGIC, FORMAT, *what, key, spare, 0))
        rows = np.array(said, SLOT)
        self._table[slots] = rows  # their checks are 0 still
        self._table["check"][slots] = header.checks(rows, slots, self._seed)
        try:
            self._flush(*slots.tolist())
        except OSError:
            self._table["check"][slots], self._table["state"][slots] = 0, FILLING
            with contextlib.suppress(OSError):  # those before it were written already
                self._flush(*slots.tolist())
            raise
        return entries

    def drop(self, slot: int) -> None:
        """The slot holds nothing any more."""
        self._table["check"][slot], self._table["state"][slot] = 0, FREE
        with contextlib.suppress(OSError):  # what it held is true still; `begin` will ask again
            self._flush(slot)

    # -- readers, the writer among them --------------------------------------------------------

    def entry(self, slot: int) -> SlotEntry | None:
        """What the slot holds now; None if that is nothing valid."""
        self.backing.reload(HEAD_BYTES + slot * SLOT.itemsize, SLOT.itemsize)
        row = self._table[slot : slot + 1].copy()  # once: another process may write to it
        if not header.are_held(row, np.array([slot]), self._seed, self.spec.slot_bytes)[0]:
            return None
        return _entries(row, np.array([slot]))[0]

    def still(self, entry: SlotEntry) -> bool:
        """Whether the slot held the same all the time since ``entry`` was read."""
        return self.entry(entry.slot) == entry

    def scan(self) -> ArenaScan:
        """All that is held now."""
        rows, held = self._snapshot()
        found = np.flatnonzero(held)[np.argsort(rows["order"][held], kind="stable")]
        empty = ~held & (rows["state"] == FREE) & (rows["check"] == 0)
        return ArenaScan(_entries(rows[found], found), np.flatnonzero(~held & ~empty).tolist())

    def _flush(self, *slots: int) -> None:
        for slot in slots:
            self.backing.flush(HEAD_BYTES + slot * SLOT.itemsize, SLOT.itemsize)

    def _snapshot(self) -> tuple[np.ndarray, np.ndarray]:
        """All headers at about this moment, and which of them are held."""
        self.refresh()
        rows = self._table.copy()
        slots = np.arange(len(rows))
        return rows, header.are_held(rows, slots, self._seed, self.spec.slot_bytes)

    def refresh(self) -> None:
        """See what other processes wrote."""
        self.backing.reload(HEAD_BYTES, self.spec.slots * SLOT.itemsize)

    def generations(self) -> np.ndarray:
        """A number per slot that changes whenever its content does, as last seen."""
        held = (self._table["state"] == HELD).astype(np.uint64)
        found: np.ndarray = self._table["generation"] * np.uint64(2) + held
        return found

    def address(self, slot: int) -> int:
        """Where the slot's payload is in memory; only of an arena that is in memory."""
        return int(self.backing.bytes.ctypes.data) + self.offset(slot)

    def offset(self, slot: int) -> int:
        """Where the slot's payload is in the arena."""
        return self._first + slot * self._stride

    def payload(self, slot: int) -> np.ndarray:
        """Bytes of the slot's payload in memory, all of its pages; not to be kept."""
        start = self.offset(slot)
        return self.backing.bytes[start : start + self._stride]

    @property
    def path(self) -> Path:
        """Where other processes of ours find it while we live; not of `make` unless followed."""
        return Path(f"/proc/{os.getpid()}/fd/{self.backing.fd}")

    def is_at(self, path: Path) -> bool:
        """Whether the file at ``path`` is still this arena, and has not been replaced."""
        try:
            return path.stat().st_ino == self.backing.inode
        except OSError:
            return False

    def begin_read(self) -> None:
        """A payload is read from here on: until `end_read` the memory or file stays open."""
        self._readers += 1

    def end_read(self) -> None:
        """One reader less."""
        self._readers -= 1
        if self._closing:
            self.close()

    def close(self) -> None:
        """Let go of memory and lock once nobody reads; a file keeps its content. Idempotent."""
        self._closing = True
        if not self._readers:
            self._table = np.empty(0, SLOT)
            self.backing.close()


def make(spec: ArenaSpec, followed: bool = False, nodes: Nodes = ()) -> Arena:
    """An arena in memory of our own, empty; ``followed``: one that other processes `look` at.

    ``nodes``: where it had better lie. Raises StoreError.
    """
    opened = (backing.nameless if followed else backing.anonymous)(spec.nbytes, nodes)
    identity = secrets.token_bytes(16)
    opened.bytes[:HEAD_BYTES] = np.frombuffer(header.arena_head(spec, identity), np.uint8)
    return Arena(spec, opened, identity)


def attach(spec: ArenaSpec, path: Path, wrap: backing.Wrap = backing.mapped) -> Arena:
    """The arena in the file at ``path``, with its content, ourselves its writer.

    Made anew where there is none, or one that is not as ``spec`` says; a file that never was an
    arena is left alone. Raises StoreError.
    """
    for _ in range(ATTEMPTS):
        opened = backing.open_to_write(path, wrap)
        if opened is not None:
            raw = opened.bytes[:HEAD_BYTES].tobytes()
            head = header.read_head(raw)
            if not isinstance(head, str) and head[0] == spec and opened.nbytes == spec.nbytes:
                return Arena(spec, opened, head[1])
            start = raw[: len(ARENA_MAGIC)].rstrip(b"\0")  # cut short, it is ours still
            if not ARENA_MAGIC.startswith(start):
                opened.close()
                raise StoreError(Reason.FOREIGN, f"{path} is no arena of kvconnect; move it away")
            with contextlib.suppress(OSError):
                path.unlink()
            opened.close()
        identity = secrets.token_bytes(16)
        try:
            opened = backing.create(path, spec, header.arena_head(spec, identity), wrap)
        except StoreError as e:
            if e.reason is Reason.TAKEN:  # another was faster: it is theirs, or left by now
                continue
            raise
        return Arena(spec, opened, identity)
    raise StoreError(Reason.TAKEN, f"{path} is used by another process")


def look(path: Path, fingerprint: bytes, wrap: backing.Wrap = backing.mapped) -> Arena:
    """The arena in the file at ``path``, to read; its writer may be at work. Raises StoreError."""
    opened = backing.open_to_read(path, wrap)
    head = header.read_head(opened.bytes[:HEAD_BYTES].tobytes())
    if isinstance(head, str):
        problem = head
    elif head[0].fingerprint != fingerprint:
        problem = "is of another model, shard or format"
    elif opened.nbytes != head[0].nbytes:
        problem = f"is {opened.nbytes} bytes long, expected {head[0].nbytes}"
    else:
        return Arena(head[0], opened, head[1])
    opened.close()
    raise StoreError(Reason.FOREIGN, f"{path} {problem}")


def _entries(rows: np.ndarray, slots: np.ndarray) -> list[SlotEntry]:
    keys = np.ascontiguousarray(rows["key"]).tobytes()
    names = ("group", "tokens", "nbytes", "digest", "generation", "order")
    columns = [rows[name].tolist() for name in names]
    found = zip(slots.tolist(), range(0, len(keys), 32), *columns, strict=True)
    return [SlotEntry(slot, keys[at : at + 32], *rest) for slot, at, *rest in found]
