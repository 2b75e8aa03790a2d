"""Carries out the scheduler's jobs on one rank's vault.

* Each numbered job is answered once, in `take`; what cannot be started is answered with an error.
* A key that a job is about, and that is not there, is reported as lost.
* Not thread-safe: the mover's thread owns it.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvconnect.offload.jobs import Answer, Fill, Forget, Job, Loss, Save, Spill
from kvconnect.offload.store.host import Ended


class Vault(Protocol):
    """What a hand needs; `kvconnect.testing.vault_contract` holds `store.vault.Vault` and the fake
    to it."""

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""

    def save(self, ticket: int, key: bytes, group: int, blocks: Sequence[int]) -> bool:
        """Start to copy blocks into memory; False: skipped."""

    def load(self, ticket: int, key: bytes, group: int, blocks: Sequence[int]) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK; False: a miss."""

    def spill(self, ticket: int, key: bytes) -> bool:
        """Start to write what memory holds to disk; False: dropped, or not needed."""

    def forget(self, key: bytes) -> None:
        """Memory holds it no more."""

    def forget_on_disk(self, key: bytes) -> None:
        """The disk holds it no more."""

    def holds(self, key: bytes, on_disk: bool) -> bool:
        """Whether the disk, or memory, holds a key."""

    def keys(self, on_disk: bool) -> list[bytes]:
        """What the disk, or memory, holds, oldest first."""

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        """What other engines hold: keys that came, and keys that went, since the last call."""

    def poll(self) -> list[Ended]:
        """Tickets that ended since the last call, each once."""

    def take_lost(self) -> list[Loss]:
        """What turned out to be damaged since the last call, and is gone."""


class Hand:
    """See the module's contract."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._answers: list[Answer] = []
        self._lost: list[Loss] = []

    @property
    def busy(self) -> bool:
        """Whether `take` has something to wait for."""
        return self._vault.busy or bool(self._answers or self._lost)

    def found(self) -> tuple[list[bytes], list[bytes]]:
        """Keys in memory and on disk, oldest first: what is there when the engine starts."""
        return self._vault.keys(on_disk=False), self._vault.keys(on_disk=True)

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        """For `OffloadTier.beside`; reads headers, so not at every step."""
        return self._vault.look_around()

    def put(self, jobs: Iterable[Job]) -> None:
        """Start jobs."""
        for job in jobs:
            if not self._start(job):
                assert not isinstance(job, Forget)
                self._answers.append(Answer(job.number, "not started"))
                if not isinstance(job, Save):
                    media = (False, True) if isinstance(job, Fill) else (False,)
                    gone = [on_disk for on_disk in media if not self._vault.holds(job.key, on_disk)]
                    self._lost += [Loss(job.key, on_disk) for on_disk in gone]

    def take(self) -> tuple[list[Answer], list[Loss]]:
        """What ended, and what was found to be lost, since the last call."""
        self._answers += [Answer(ended.ticket, ended.error) for ended in self._vault.poll()]
        answers, self._answers = self._answers, []
        lost, self._lost = self._lost + self._vault.take_lost(), []
        return answers, lost

    def _start(self, job: Job) -> bool:
        vault = self._vault
        match job:
            case Save():
                return vault.save(job.number, job.key, job.group, job.blocks)
            case Fill():
                return vault.load(job.number, job.key, job.group, job.blocks)
            case Spill():
                if vault.holds(job.key, on_disk=True):
                    self._answers.append(Answer(job.number, ""))
                    return True
                return vault.spill(job.number, job.key)
            case Forget():
                (vault.forget_on_disk if job.on_disk else vault.forget)(job.key)
                return True


def common(found: Sequence[Sequence[bytes]]) -> tuple[list[bytes], list[set[bytes]]]:
    """Keys that every rank found, in the first one's order, and what each found besides."""
    if not found:
        return [], []
    everywhere = set(found[0]).intersection(*found[1:])
    kept = [key for key in found[0] if key in everywhere]
    return kept, [set(keys) - everywhere for keys in found]
