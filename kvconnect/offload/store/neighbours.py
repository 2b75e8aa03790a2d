"""Arenas that other engines write to, to read from; and which file of a folder is whose.

Engines that share have a folder and an arena each in it, named by fingerprint: a writer cannot
touch another's, and a reader has no right to write. Capacities add up. What a dead engine left
is read on, until a new one takes it over with its content.

* Nothing here is locked against the writers: an `SlotEntry` may be overwritten at any moment.
  Whoever reads its payload checks `still` after that, and sums always. Between `Arena.begin_read`
  and `end_read` it stays open, whatever becomes of its file.
* A folder or file that cannot be looked at or read (ESTALE, EIO, EACCES, no descriptor left) is
  never our own fault: that neighbour is switched off for `OFF_S`, counted, and looked at again.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.store.arena import Arena, SlotEntry, attach, look
from kvconnect.offload.store.backing import Wrap, mapped
from kvconnect.offload.store.header import ArenaSpec

logger = logging.getLogger(f"vllm.{__name__}")

SUFFIX = ".kvarena"
MOST = 64  # arenas of one fingerprint in one folder
OFF_S = 60.0


class Find(NamedTuple):
    """Where a key was seen."""

    arena: Arena
    entry: SlotEntry


def claim(folder: Path, spec: ArenaSpec, wrap: Wrap = mapped) -> tuple[Arena, Path]:
    """The first arena in ``folder`` that nobody else writes to, with what it holds.

    Raises StoreError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(Reason.FAILED, f"{folder}: {e.strerror}") from e
    for number in range(MOST):
        path = _path(folder, spec.fingerprint, number)
        try:
            return attach(spec, path, wrap), path
        except StoreError as e:
            if e.reason is not Reason.TAKEN:
                raise
    raise StoreError(Reason.TAKEN, f"{folder}: {MOST} engines write to arenas there already")


def other_paths(folder: Path, fingerprint: bytes, own: Path | None) -> list[Path]:
    """Where arenas of a fingerprint may lie in ``folder``, our own left out."""
    paths = (_path(folder, fingerprint, number) for number in range(MOST))
    return [path for path in paths if path != own]


class Neighbours:
    """See the module's contract. Not thread-safe."""

    def __init__(
        self,
        paths: Sequence[Path],
        fingerprint: bytes,
        wrap: Wrap = mapped,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``paths``: where their arenas may be; not all of them need to be there."""
        self.counts: Counter[str] = Counter()
        self._paths = paths
        self._fingerprint = fingerprint
        self._wrap = wrap
        self._clock = clock
        self._off_until_s: dict[Path, float] = {}
        self._arenas: dict[Path, Arena] = {}
        self._seen: dict[Path, np.ndarray] = {}  # generations
        self._entries: dict[Path, dict[int, SlotEntry]] = {}  # slot → what it held
        self._found: dict[bytes, dict[tuple[Path, int], SlotEntry]] = {}  # key → where it is

    def refresh(self) -> tuple[list[bytes], list[bytes]]:
        """Look again; returns keys that can be had now and could not, and the other way round."""
        before = set(self._found)
        now_s = self._clock()
        for path in self._paths:
            if now_s < self._off_until_s.get(path, now_s):
                continue
            try:
                self._look(path)
            except (OSError, StoreError) as e:
                self._switch_off(path, str(e))
            except AssertionError:
                raise
            except Exception as e:  # whatever is in that file, it is not ours
                logger.exception("kvconnect: what another engine stored cannot be looked at")
                self._switch_off(path, f"{type(e).__name__}: {e}")
        after = set(self._found)
        return sorted(after - before), sorted(before - after)

    def spoilt(self, arena: Arena, why: str) -> None:
        """A payload of ``arena`` could not be read: it is left alone for `OFF_S`."""
        for path in [path for path, one in self._arenas.items() if one is arena]:
            self._switch_off(path, why)

    def find(self, key: bytes) -> Find | None:
        """A slot that holds ``key`` at this moment; None if nobody's does."""
        for (path, _), entry in self._found.get(key, {}).items():
            if self._arenas[path].still(entry):
                return Find(self._arenas[path], entry)
        return None

    def arena_of(self, identity: bytes) -> Arena | None:
        """The arena with this random identity, if it is among those last seen."""
        return next((one for one in self._arenas.values() if one.identity == identity), None)

    def found(self) -> list[bytes]:
        """All that can be had, as last seen."""
        return list(self._found)

    def close(self) -> None:
        """Let go of all of them. Idempotent."""
        for path in list(self._arenas):
            self._forget(path)

    def identities(self) -> set[bytes]:
        """Random identities of the arenas that were last seen."""
        return {one.identity for one in self._arenas.values()}

    def _look(self, path: Path) -> None:
        """See what is at ``path`` now; raises OSError or StoreError if that cannot be said."""
        if path in self._arenas and not self._arenas[path].is_at(path):
            self._forget(path)
        if path not in self._arenas:
            if not path.exists():
                return
            try:
                self._arenas[path] = look(path, self._fingerprint, self._wrap)
            except StoreError as e:
                if e.reason is Reason.FAILED and path.exists():
                    raise
                return  # it is another's, or gone or replaced by now
            self._seen[path] = np.empty(0)
            self._entries[path] = {}
        self._update(path)

    def _switch_off(self, path: Path, why: str) -> None:
        if path in self._arenas:
            self._forget(path)
        self._off_until_s[path] = self._clock() + OFF_S
        self.counts["neighbours_switched_off"] += 1
        logger.warning(
            "kvconnect: what another engine stored cannot be read (%s: %s); it is looked at again "
            "in %.0f s",
            path,
            why,
            OFF_S,
        )

    def _update(self, path: Path) -> None:
        arena, entries = self._arenas[path], self._entries[path]
        arena.refresh()
        now, seen = arena.generations(), self._seen[path]
        changed = np.flatnonzero(now != seen) if len(seen) == len(now) else np.arange(len(now))
        self._seen[path] = now
        if len(changed) > len(now) // 8:  # cheaper all at once
            current = {e.slot: e for e in arena.scan().entries}
        else:
            read = ((int(slot), arena.entry(int(slot))) for slot in changed)
            current = {slot: entry for slot, entry in read if entry is not None}
        for slot in changed.tolist():
            if old := entries.pop(slot, None):
                self._drop(path, old)
            if new := current.get(slot):
                entries[slot] = new
                self._found.setdefault(new.key, {})[path, slot] = new

    def _drop(self, path: Path, entry: SlotEntry) -> None:
        where = self._found[entry.key]
        del where[path, entry.slot]
        if not where:
            del self._found[entry.key]

    def _forget(self, path: Path) -> None:
        for entry in self._entries.pop(path, {}).values():
            self._drop(path, entry)
        self._seen.pop(path, None)
        self._arenas.pop(path).close()


def _path(folder: Path, fingerprint: bytes, number: int) -> Path:
    return folder / f"{fingerprint[:12].hex()}-{number}{SUFFIX}"
