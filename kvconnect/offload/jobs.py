"""What an offloading scheduler asks of every rank, and what a rank answers.

* Jobs are immutable and picklable. All ranks get the same, and carry them out in sequence.
* Each job with a number is answered once by every rank, however it went; `Forget` never is.
"""

from typing import NamedTuple

from kvconnect.offload.eviction import Key


class Save(NamedTuple):
    """Blocks → memory. The blocks stay as they are until every rank has answered."""

    number: int
    key: Key
    group: int
    blocks: tuple[int, ...]


class Fill(NamedTuple):
    """Memory, or disk by way of memory, → those of ``blocks`` that are not NO_BLOCK."""

    number: int
    key: Key
    group: int
    blocks: tuple[int, ...]


class Spill(NamedTuple):
    """Memory → disk."""

    number: int
    key: Key


class Forget(NamedTuple):
    """Memory, or the disk, holds the key no more; if it ever did."""

    key: Key
    on_disk: bool


Job = Save | Fill | Spill | Forget


class JobDone(NamedTuple):
    """A job has ended, on one rank or in one of its stores."""

    id: int
    """The job's number, given by the one who ordered it."""
    error: str = ""
    """Why it failed; empty if it went well."""
    nbytes: int = 0
    """How many bytes were moved."""
    seconds: float = 0.0
    """How long that took, where it was measured."""


class Loss(NamedTuple):
    """A rank found that it does not have what it was thought to have."""

    key: Key
    on_disk: bool
