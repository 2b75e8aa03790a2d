"""Shelf over an arena: no payload changes under a reader, and a crash forgets only the unfinished.

The model is what each slot's payload has to be; every invariant reads it back from memory.
"""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.offload.store import backing
from kvconnect.offload.store.arena import Written, attach, look
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.slot_index import SlotIndex

picks = st.integers(0, 1 << 16)
KEYS = [bytes([n]) * 32 for n in range(8)]


class ShelfMachine(RuleBasedStateMachine):
    wrap = staticmethod(backing.mapped)

    @initialize(slots=st.integers(1, 6))
    def start(self, slots):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "arena"
        self.spec = ArenaSpec(slots, 64, b"\x01" * 32)
        self.contents = 0
        self.held = {}  # key → content
        self.filling = {}  # slot → (key, content)
        self.reading = []  # (entry, content)
        self.open()

    def open(self):
        self.index = SlotIndex(attach(self.spec, self.path, self.wrap))

    def teardown(self):
        if hasattr(self, "index"):
            self.index.arena.close()
            self.folder.cleanup()

    def content(self, slot):
        arena = self.index.arena
        if isinstance(arena.backing, backing.FileBacking):
            return int.from_bytes(os.pread(arena.backing.fd, 8, arena.offset(slot)), "little")
        return int.from_bytes(arena.payload(slot)[:8].tobytes(), "little")

    def write(self, slot, raw):
        arena = self.index.arena
        if isinstance(arena.backing, backing.FileBacking):
            os.pwrite(arena.backing.fd, raw, arena.offset(slot))
        else:
            arena.payload(slot)[:8] = list(raw)

    @rule(number=picks)
    def fill(self, number):
        busy = {e.slot for e, _ in self.reading} | set(self.filling)
        slot = self.index.fill()
        if slot is None:
            held = {self.index.slot_of(k) for k in self.held}
            assert len(busy | held) == self.spec.slots, "a free slot was withheld"
            return
        assert slot not in busy
        self.contents += 1
        self.filling[slot] = KEYS[number % len(KEYS)], self.contents
        self.write(slot, self.contents.to_bytes(8, "little"))

    @precondition(lambda self: self.filling)
    @rule(number=picks)
    def abandon(self, number):
        slot = list(self.filling)[number % len(self.filling)]
        del self.filling[slot]
        self.index.abandon(slot)

    @precondition(lambda self: self.filling)
    @rule(count=st.integers(1, 4))
    def commit_together(self, count):
        """Two of one key among them, too: the later one stays."""
        ended = [(slot, *self.filling.pop(slot)) for slot in list(self.filling)[:count]]
        written = [Written(slot, key, 0, 1, 8, content) for slot, key, content in ended]
        entries = self.index.commit(*written)
        assert [(one.slot, one.key, one.digest) for one in entries] == ended
        for _, key, content in ended:
            self.held.pop(key, None)
            self.held[key] = content

    @rule(number=picks)
    def use(self, number):
        key = KEYS[number % len(KEYS)]
        entry = self.index.use(key)
        assert (entry is None) == (key not in self.held)
        if entry is not None:
            self.reading.append((entry, self.held[key]))

    @precondition(lambda self: self.reading)
    @rule(number=picks)
    def done(self, number):
        entry, _ = self.reading.pop(number % len(self.reading))
        self.index.done(entry)

    @rule(number=picks)
    def drop(self, number):
        key = KEYS[number % len(KEYS)]
        self.index.drop(key)
        self.held.pop(key, None)

    @rule()
    def crash_and_start_again(self):
        self.index.arena.close()
        unfinished = len(self.filling)
        self.filling.clear()
        self.reading.clear()
        self.open()
        assert self.index.discarded == unfinished

    @invariant()
    def every_payload_is_what_it_has_to_be(self):
        if not hasattr(self, "index"):
            return
        for entry, content in self.reading:
            assert self.content(entry.slot) == content, "it changed under a reader"
        assert self.index.keys() == list(self.held)
        reader = look(self.path, self.spec.fingerprint, self.wrap)
        seen = {e.key: e.digest for e in reader.scan().entries}
        reader.close()
        assert seen == self.held
        for key, content in self.held.items():
            entry = self.index.use(key)
            assert self.content(entry.slot) == entry.digest == content
            self.index.done(entry)
        slots = {e.slot for e, _ in self.reading} | set(self.filling)
        slots |= {self.index.slot_of(k) for k in self.held}
        assert self.index.free == self.spec.slots - len(slots)


class FiledShelfMachine(ShelfMachine):
    wrap = backing.FileBacking


def case(machine):
    examples = max(20, settings.default.max_examples // 5)
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40)
    return pytest.mark.slow(machine.TestCase)


TestShelf = case(ShelfMachine)
TestFiledShelf = case(FiledShelfMachine)
