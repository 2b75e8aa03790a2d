"""Arenas: what was committed is found again, and nothing else, whenever the writer stopped."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.store import arena as arenas
from kvconnect.offload.store import backing, header
from kvconnect.offload.store.arena import Written, attach, look, make
from kvconnect.offload.store.header import HEAD_BYTES, SLOT, ArenaSpec
from kvconnect.offload.store.slot_index import SlotIndex

SPEC = ArenaSpec(slots=8, slot_bytes=5000, fingerprint=b"\x07" * 32)


def key(number):
    return number.to_bytes(32, "big")


def write(arena, slot, content):
    """As whoever owns the payload does, of either kind."""
    if isinstance(arena.backing, backing.FileBacking):
        os.pwrite(arena.backing.fd, content, arena.offset(slot))
    else:
        arena.payload(slot)[: len(content)] = list(content)


def read(arena, slot, nbytes):
    if isinstance(arena.backing, backing.FileBacking):
        return os.pread(arena.backing.fd, nbytes, arena.offset(slot))
    return arena.payload(slot)[:nbytes].tobytes()


def store(arena, slot, number, nbytes=5000):
    arena.begin(slot)
    write(arena, slot, bytes([number % 251]) * nbytes)
    return arena.commit([Written(slot, key(number), 0, 16, nbytes, number)])[0]


@pytest.fixture(params=[backing.mapped, backing.FileBacking], ids=["mapped", "filed"])
def wrap(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arena"


def held(arena):
    return {entry.slot: int.from_bytes(entry.key, "big") for entry in arena.scan().entries}


# -- what it holds -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_new_arena_holds_nothing(where, path):
    arena = make(SPEC) if where == "memory" else attach(SPEC, path)
    assert arena.new
    assert arena.scan() == ([], [])
    assert all(arena.entry(slot) is None for slot in range(SPEC.slots))
    arena.close()
    arena.close()


def test_a_slot_is_held_from_commit_to_the_next_begin():
    arena = make(SPEC)
    arena.begin(3)
    assert arena.entry(3) is None
    assert arena.scan() == ([], [3])
    entry = arena.commit([Written(3, key(9), 1, 16, 5000, 77)])[0]
    assert entry[:6] == (3, key(9), 1, 16, 5000, 77)
    assert arena.entry(3) == entry
    assert arena.scan() == ([entry], [])
    arena.begin(3)
    assert not arena.still(entry)
    again = arena.commit([Written(3, key(9), 1, 16, 5000, 77)])[0]
    assert again != entry, "a reader would take the second content for the first"
    arena.drop(3)
    assert arena.entry(3) is None
    assert arena.scan() == ([], [])


def test_slots_do_not_overlap_and_are_whole_pages_apart():
    arena = make(SPEC)
    for slot in range(SPEC.slots):
        arena.payload(slot)[:] = slot
    assert all((arena.payload(slot) == slot).all() for slot in range(SPEC.slots))
    assert {arena.address(slot) % 4096 for slot in range(SPEC.slots)} == {0}
    assert all(arena.payload(s).ctypes.data == arena.address(s) for s in range(SPEC.slots))


def test_content_is_found_again_in_the_order_of_commits(wrap, path):
    arena = attach(SPEC, path, wrap)
    for number, slot in enumerate((5, 0, 7, 2)):
        store(arena, slot, 100 + number)
    arena.drop(0)
    arena.close()
    arena = attach(SPEC, path, wrap)
    assert not arena.new
    assert [e.key for e in arena.scan().entries] == [key(100), key(102), key(103)]
    assert read(arena, 7, 5000) == bytes([102]) * 5000
    assert store(arena, 1, 200).order == arena.entry(2).order + 1 == 5


def test_generations_change_with_content():
    arena = make(SPEC)
    seen = [arena.generations()]
    for act in (
        lambda: arena.begin(4),
        lambda: arena.commit([Written(4, key(1), 0, 1, 1, 1)]),
        lambda: arena.drop(4),
        lambda: arena.begin(4),
        lambda: arena.commit([Written(4, key(1), 0, 1, 1, 1)]),
    ):
        act()
        seen.append(arena.generations())
        assert (np.flatnonzero(seen[-1] != seen[-2]) == 4).all()
    assert seen[5][4] != seen[2][4] != seen[0][4]


# -- a writer that stops at any line -----------------------------------------------------------


def lines_of(arena, act, snapshot):
    """Run ``act``; call ``snapshot`` before every line of the arena's code that it runs."""

    def trace(frame, event, _):
        if frame.f_code.co_filename != arenas.__file__:
            return None
        if event == "line":
            snapshot()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)


def test_at_every_line_a_crash_leaves_the_old_content_or_the_new_or_nothing(wrap, path):
    arena = attach(SPEC, path, wrap)
    store(arena, 1, 11)
    store(arena, 2, 22)
    images = []
    lines_of(arena, lambda: store(arena, 2, 33), lambda: images.append(path.read_bytes()))
    lines_of(arena, lambda: arena.drop(1), lambda: images.append(path.read_bytes()))
    assert len(images) > 12
    found = []
    for number, image in enumerate(images):
        copy = path.with_name(f"crash{number}")
        copy.write_bytes(image)
        after = attach(SPEC, copy, wrap)
        for slot, number in held(after).items():
            assert read(after, slot, 5000) == bytes([number]) * 5000
        found.append(held(after))
        after.close()
    steps = [found[0]] + [now for now, last in zip(found[1:], found, strict=False) if now != last]
    assert steps == [{1: 11, 2: 22}, {1: 11}, {1: 11, 2: 33}, {2: 33}]


def test_a_header_torn_at_any_byte_or_flipped_at_any_bit_is_not_believed(path):
    arena = attach(SPEC, path)
    old = store(arena, 0, 1)
    before = path.read_bytes()[HEAD_BYTES : HEAD_BYTES + 128]
    new = store(arena, 0, 2)
    after = path.read_bytes()[HEAD_BYTES : HEAD_BYTES + 128]
    rows = [after[:n] + before[n:] for n in range(129)] + [
        before[:n] + after[n:] for n in range(129)
    ]
    for bit in range(128 * 8):
        flipped = bytearray(after)
        flipped[bit // 8] ^= 1 << bit % 8
        rows.append(bytes(flipped))
    raw = np.frombuffer(b"".join(rows), SLOT)
    seed = header.seed_of(SPEC.fingerprint)
    valid = header.are_held(raw, np.zeros(len(raw), int), seed, SPEC.slot_bytes)
    assert {rows[i] for i in np.flatnonzero(valid)} == {before, after}
    assert old != new


def first_row(arena):
    """The header of slot 0, as it is."""
    start = header.HEAD_BYTES
    return arena.backing.bytes[start : start + header.SLOT.itemsize].view(header.SLOT)


def test_a_row_is_no_row_of_another_slot_or_another_arena():
    arena = make(SPEC)
    row = first_row(arena)
    store(arena, 0, 1)
    seed = header.seed_of(SPEC.fingerprint)
    here, there = np.array([0]), np.array([1])
    assert header.are_held(row.copy(), here, seed, 5000)[0]
    assert not header.are_held(row.copy(), there, seed, 5000)[0]
    assert not header.are_held(row.copy(), here, header.seed_of(b"other" * 8), 5000)[0]
    assert not header.are_held(row.copy(), here, seed, 4999)[0]


@pytest.mark.parametrize("field", ["magic", "format", "state"])
def test_a_row_of_another_kind_is_not_believed_though_its_check_is_right(field):
    """As a later version might write them."""
    arena = make(SPEC)
    store(arena, 0, 1)
    row, here, seed = first_row(arena).copy(), np.array([0]), header.seed_of(SPEC.fingerprint)
    assert header.are_held(row, here, seed, 5000)[0]
    row[field] ^= 4
    row["check"] = header.checks(row, here, seed)
    assert not header.are_held(row, here, seed, 5000)[0]


def test_a_check_is_cleared_before_a_payload_is_touched(wrap, path):
    arena = attach(SPEC, path, wrap)
    store(arena, 1, 1)
    arena.begin(1)
    end = HEAD_BYTES + 2 * 128
    assert path.read_bytes()[end - 8 : end] == bytes(8)


# -- files that are not what they should be ----------------------------------------------------


def damage(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    "kind", ["spec", "header", "identity", "truncated", "empty", "short", "longer"]
)
def test_a_file_that_is_something_else_is_made_anew(kind, wrap, path):
    arena = attach(SPEC, path, wrap)
    store(arena, 0, 1)
    identity = arena.identity
    arena.close()
    spec = SPEC
    if kind == "spec":
        spec = SPEC._replace(fingerprint=b"\x08" * 32)
    elif kind in ("header", "identity"):
        at = {"header": 40, "identity": 80}[kind]
        damage(path, at, bytes([path.read_bytes()[at] ^ 1]))
    else:
        size = {"truncated": SPEC.nbytes - 4096, "empty": 0, "short": 10, "longer": SPEC.nbytes + 1}
        os.truncate(path, size[kind])
    if kind != "spec":
        with pytest.raises(StoreError) as refused:
            look(path, SPEC.fingerprint, wrap)
        assert refused.value.reason is Reason.FOREIGN
    arena = attach(spec, path, wrap)
    assert arena.new
    assert arena.identity != identity
    assert arena.scan() == ([], [])
    assert path.stat().st_size == SPEC.nbytes
    assert list(path.parent.iterdir()) == [path], "drafts are left over"


def test_a_file_that_never_was_an_arena_is_left_alone(wrap, path):
    path.write_bytes(b"my thesis, and nothing else of it exists")
    for use in (lambda: attach(SPEC, path, wrap), lambda: look(path, SPEC.fingerprint, wrap)):
        with pytest.raises(StoreError, match=r"no arena|bytes long") as refused:
            use()
        assert refused.value.reason is Reason.FOREIGN
    assert path.read_bytes().startswith(b"my thesis")


def test_another_format_is_not_read(path, monkeypatch):
    monkeypatch.setattr(header, "FORMAT", header.FORMAT + 1)
    attach(SPEC, path).close()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has format 2, expected 1"):
        look(path, SPEC.fingerprint)
    assert attach(SPEC, path).new


def test_a_header_that_cannot_be_written_is_told_and_changes_nothing(path, monkeypatch):
    arena = attach(SPEC, path, backing.FileBacking)
    store(arena, 0, 1)

    def broken(*arguments):
        raise OSError(5, "Input/output error")

    arena.begin(1)
    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input"):
        arena.begin(0)
    with pytest.raises(OSError, match="Input"):
        arena.commit([Written(1, key(2), 0, 16, 5000, 2)])
    assert arena.entry(1) is None
    arena.drop(0)
    monkeypatch.undo()
    assert arena.commit([Written(1, key(2), 0, 16, 5000, 2)])[0] == arena.entry(1)
    assert held(arena) == {1: 2}


def test_of_headers_written_together_none_counts_if_one_cannot_be_written(path, monkeypatch):
    """A reader, or who starts after a crash, would take for held what is being filled still."""
    arena = attach(SPEC, path, backing.FileBacking)
    write_through = arena.backing.flush
    for slot in range(3):
        arena.begin(slot)

    def broken(offset, nbytes):
        if offset == HEAD_BYTES + 2 * SLOT.itemsize:
            raise OSError(5, "Input/output error")
        write_through(offset, nbytes)

    monkeypatch.setattr(arena.backing, "flush", broken)
    with pytest.raises(OSError, match="Input"):
        arena.commit([Written(slot, key(slot), 0, 16, 5000, slot) for slot in range(3)])
    assert not held(arena)
    assert not held(look(path, SPEC.fingerprint, backing.FileBacking))


def test_no_room_is_an_error_when_it_is_opened_and_leaves_nothing_behind(path):
    """It used to be found out by SIGBUS, at some later store."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SPEC.nbytes - 1, limits[1]))
    try:
        with pytest.raises(StoreError) as refused:
            attach(SPEC, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.reason is Reason.FULL
    assert list(path.parent.iterdir()) == []
    with pytest.raises(StoreError, match="bytes of memory") as refused:
        make(SPEC._replace(slots=1 << 40, slot_bytes=1 << 12))
    assert refused.value.reason is Reason.FULL


def test_all_of_a_file_s_room_is_reserved_and_nobody_else_may_read_it(path, wrap):
    arena = attach(SPEC, path, wrap)
    found = path.stat()
    assert found.st_blocks * 512 >= SPEC.nbytes
    assert found.st_mode & 0o777 == 0o600
    arena.close()


def test_memory_that_others_map_needs_no_name():
    arena = make(SPEC, followed=True)
    store(arena, 0, 1)
    reader = look(arena.path, SPEC.fingerprint)
    assert held(reader) == {0: 1}
    reader.close()
    arena.close()
    with pytest.raises(StoreError, match="bytes of shared memory"):  # no address space for it
        make(SPEC._replace(slots=1 << 40, slot_bytes=1 << 12), followed=True)


def test_a_folder_that_is_not_there_is_a_failure(path):
    with pytest.raises(StoreError, match="No such file") as refused:
        attach(SPEC, path / "absent" / "arena")
    assert refused.value.reason is Reason.FAILED


# -- several processes -------------------------------------------------------------------------


def test_an_arena_has_one_writer_and_any_number_of_readers(wrap, path):
    arena = attach(SPEC, path, wrap)
    with pytest.raises(StoreError) as refused:
        attach(SPEC, path, wrap)
    assert refused.value.reason is Reason.TAKEN
    readers = [look(path, SPEC.fingerprint, wrap) for _ in range(2)]
    store(arena, 6, 60)
    assert [held(reader) for reader in readers] == [{6: 60}] * 2
    with pytest.raises(ValueError, match="read-only"):
        readers[0].begin(6)
    with pytest.raises((ValueError, OSError), match=r"read-only|Bad file"):
        write(readers[0], 6, b"x")
    with pytest.raises(StoreError, match="another model"):
        look(path, b"\x08" * 32)
    arena.close()
    assert held(readers[0]) == {6: 60}
    assert held(attach(SPEC, path, wrap)) == {6: 60}


def test_a_closed_arena_is_free_though_somebody_still_looks_at_its_memory(path):
    """A traceback did, of a write that had failed, and the next engine found nothing."""
    arena = attach(SPEC, path)
    store(arena, 0, 1)
    view = arena.payload(0)
    arena.close()
    again = attach(SPEC, path)
    assert held(again) == {0: 1}
    assert (view[:5000] == 1).all()


def test_a_reader_notices_that_its_arena_was_replaced(wrap, path):
    arena = attach(SPEC, path, wrap)
    store(arena, 0, 1)
    reader = look(path, SPEC.fingerprint, wrap)
    assert reader.is_at(path)
    arena.close()
    attach(SPEC._replace(slots=4), path, wrap)
    assert not reader.is_at(path)
    assert held(reader) == {0: 1}, "what it maps is still what it was"
    path.unlink()
    assert not reader.is_at(path)


def test_two_that_make_it_at_once_do_not_both_get_it(path, monkeypatch):
    first = []

    def slow(*arguments):
        monkeypatch.undo()
        first.append(attach(SPEC, path))
        return backing.create(*arguments)

    monkeypatch.setattr(backing, "create", slow)
    with pytest.raises(StoreError) as refused:
        attach(SPEC, path)
    assert refused.value.reason is Reason.TAKEN
    store(first[0], 0, 1)
    assert held(look(path, SPEC.fingerprint)) == {0: 1}


def test_who_made_it_first_and_left_has_made_it_for_us(path, monkeypatch):
    def slow(*arguments):
        monkeypatch.undo()
        first = attach(SPEC, path)
        store(first, 0, 1)
        first.close()
        return backing.create(*arguments)

    monkeypatch.setattr(backing, "create", slow)
    assert held(attach(SPEC, path)) == {0: 1}


def test_a_file_that_was_replaced_before_it_was_locked_is_not_taken(path, monkeypatch):
    """Its writer would write to a file that nobody finds."""
    attach(SPEC, path).close()
    lock = backing.fcntl.flock

    def late(*arguments):
        monkeypatch.undo()
        path.unlink()
        attach(SPEC, path).close()
        lock(*arguments)

    monkeypatch.setattr(backing.fcntl, "flock", late)
    arena = attach(SPEC, path)
    assert arena.is_at(path)


def test_of_two_slots_with_one_key_the_newer_is_held_and_the_other_forgotten(path):
    """As after a header that could not be written when its key was dropped."""
    arena = attach(SPEC, path)
    store(arena, 0, 1)
    store(arena, 1, 1)
    index = SlotIndex(arena)
    found = index.use(key(1))
    index.done(found)
    assert found.slot == 1
    index.drop(key(1))
    assert held(arena) == {}


def test_a_slot_that_two_read_is_free_when_both_are_done():
    index = SlotIndex(make(SPEC._replace(slots=1)))
    slot = index.fill()
    index.commit(Written(slot, key(1), 0, 16, 10, 0))
    first, second = index.use(key(1)), index.use(key(1))
    index.drop(key(1))
    index.done(first)
    assert index.fill() is None
    index.done(second)
    assert index.fill() == slot


@pytest.mark.slow
def test_the_lock_of_a_killed_writer_is_free(path):
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_arena import *
arena = attach(SPEC, Path({str(path)!r}))
store(arena, 1, 10)
arena.begin(2)
arena.payload(2)[:100] = 3
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    arena = attach(SPEC, path)
    assert held(arena) == {1: 10}
    assert arena.scan().discarded == [2]


def test_of_two_payloads_of_one_key_that_are_committed_together_the_later_one_stays():
    index = SlotIndex(make(SPEC))
    slots = index.fill(), index.fill()
    free = index.free
    index.commit(*(Written(slot, key(1), 0, 16, 10, slot) for slot in slots))
    assert index.slot_of(key(1)) == slots[1]
    assert index.free == free + 1, "the slot of the first one is lost"
    assert [entry.slot for entry in index.arena.scan().entries] == [slots[1]]
