"""Headers of slots, and of the arena they are in: bytes that say what other bytes are.

* A slot's header is one row of a table that is kept apart from payloads: 100,000 of them are
  12.8 MB, read at once.
* `check` covers all of a row, which slot it is of, and the arena's fingerprint. It is the last
  thing written and the first thing cleared, so a row is either all there or recognised as not.
* `digest` covers the payload, by way of one sum per block; see `SlotLayout`.
* Little endian. A change of any format here raises `FORMAT`.
"""

import hashlib
from typing import NamedTuple

import numpy as np

FORMAT = 1
HEAD_BYTES = 4096  # the arena's own header takes a page
PAGE_BYTES = 4096  # what slots are aligned to, for direct I/O

SLOT_MAGIC = 0x746F6C73  # "slot"
ARENA_MAGIC = b"kvconnect arena\n"

FREE, FILLING, HELD = range(3)  # states

SLOT = np.dtype(
    [
        ("magic", "<u4"),
        ("format", "<u2"),
        ("state", "<u2"),
        ("group", "<u4"),
        ("tokens", "<u4"),
        ("generation", "<u8"),  # how often the slot was written to
        ("order", "<u8"),  # of commits in the arena: says what is newer
        ("nbytes", "<u8"),
        ("digest", "<u8"),
        ("key", "u1", (32,)),
        ("spare", "<u8", (5,)),
        ("check", "<u8"),
    ]
)
WORDS = SLOT.itemsize // 8  # the last one is the check

ARENA = np.dtype(
    [
        ("magic", "S16"),
        ("format", "<u4"),
        ("slot_header_bytes", "<u4"),
        ("slots", "<u8"),
        ("slot_bytes", "<u8"),
        ("fingerprint", "u1", (32,)),
        ("identity", "u1", (16,)),  # random; tells one arena from another at the same path
        ("check", "u1", (16,)),
    ]
)

# splitmix64
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_PLACES = np.arange(WORDS - 1, dtype=np.uint64)


class ArenaSpec(NamedTuple):
    """What an arena is made for; an existing one is used only if all of it is equal."""

    slots: int
    slot_bytes: int
    fingerprint: bytes

    @property
    def table_bytes(self) -> int:
        """Size of all slots' headers, in whole pages."""
        return pages(self.slots * SLOT.itemsize)

    @property
    def stride(self) -> int:
        """From one slot's payload to the next."""
        return pages(self.slot_bytes)

    @property
    def payload_offset(self) -> int:
        """Where the first slot's payload is."""
        return HEAD_BYTES + self.table_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena, header and table included."""
        return self.payload_offset + self.slots * self.stride


def pages(nbytes: int) -> int:
    """``nbytes``, rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def arena_head(spec: ArenaSpec, identity: bytes) -> bytes:
    """An arena's own header, `HEAD_BYTES` long."""
    head = np.zeros((), ARENA)
    head["magic"], head["format"], head["slot_header_bytes"] = ARENA_MAGIC, FORMAT, SLOT.itemsize
    head["slots"], head["slot_bytes"] = spec.slots, spec.slot_bytes
    head["fingerprint"] = np.frombuffer(spec.fingerprint, np.uint8)
    head["identity"] = np.frombuffer(identity, np.uint8)
    head["check"] = _head_check(head)
    return head.tobytes().ljust(HEAD_BYTES, b"\0")


def read_head(raw: bytes) -> tuple[ArenaSpec, bytes] | str:
    """What an arena is made for, and its identity, by its header, or what is wrong with it."""
    if len(raw) < ARENA.itemsize:
        return f"is {len(raw)} bytes long, expected at least {HEAD_BYTES}"
    head = np.frombuffer(raw[: ARENA.itemsize], ARENA)[0]
    if head["magic"] != ARENA_MAGIC:
        return "is no arena of kvconnect"
    if head["format"] != FORMAT:
        return f"has format {head['format']}, expected {FORMAT}"
    if not np.array_equal(head["check"], _head_check(head)):
        return "has a damaged header"
    spec = ArenaSpec(int(head["slots"]), int(head["slot_bytes"]), head["fingerprint"].tobytes())
    return spec, head["identity"].tobytes()


def seed_of(fingerprint: bytes) -> np.uint64:
    """What makes a row of one arena invalid in an arena of another fingerprint."""
    digest = hashlib.blake2b(fingerprint, digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def checks(rows: np.ndarray, slots: np.ndarray, seed: np.uint64) -> np.ndarray:
    """What ``check`` has to be in ``rows``, contiguous, of these slots: uint64 ``[n]``.

    Each word is hashed with its place, so that a sum tells words, slots and arenas apart.
    """
    words = rows.view("<u8").reshape(-1, WORDS)[:, :-1]
    places = slots.astype(np.uint64)[:, None] * np.uint64(WORDS) + _PLACES
    x = words ^ (places * _STEP + seed)
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    found: np.ndarray = (x ^ (x >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    return found


def are_held(rows: np.ndarray, slots: np.ndarray, seed: np.uint64, most_bytes: int) -> np.ndarray:
    """Which of ``rows`` say truthfully that their slot holds something: bool ``[n]``."""
    found: np.ndarray = (
        (rows["magic"] == SLOT_MAGIC)
        & (rows["format"] == FORMAT)
        & (rows["state"] == HELD)
        & (rows["nbytes"] <= most_bytes)
        & (rows["check"] == checks(rows, slots, seed))
    )
    return found


def _head_check(head: np.ndarray) -> np.ndarray:
    covered = head.tobytes()[: -ARENA["check"].itemsize]
    return np.frombuffer(hashlib.blake2b(covered, digest_size=16).digest(), np.uint8)
