"""Pinning piece by piece, and a store that serves meanwhile. No device is there."""

import threading

import pytest
from store_bench import BLOCKS, CHUNK, FINGERPRINT, MODEL, key_of

from kvconnect.errors import StoreError
from kvconnect.offload.store.arena import make
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.pinning import Pinning
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.ops import load
from kvconnect_bench.caches import Cache


class Device:
    """Registers what it is let to; fails at ``broken``."""

    def __init__(self, broken=()):
        self.broken, self.seen, self.undone = broken, [], []
        self.gate = threading.Event()
        self.reached = threading.Semaphore(0)

    def register(self, address, nbytes):
        self.seen.append((address, nbytes))
        self.reached.release()
        if address > 1000 and address not in self.broken:
            self.gate.wait(10)
        return 2 if address in self.broken else 0

    def unregister(self, address):
        self.undone.append(address)
        return 0


def test_the_first_piece_is_there_at_once_and_the_rest_in_time():
    device = Device()
    pinning = Pinning(1000, 25, device.register, device.unregister, piece_bytes=10)
    pinning.start()
    pinning.go_on(threads=2)
    assert pinning.ready == 10
    device.gate.set()
    while pinning.running:
        pass
    assert pinning.ready == 25
    assert sorted(device.seen) == [(1000, 10), (1010, 10), (1020, 5)]
    pinning.close()
    pinning.close()
    assert device.undone == [1000, 1010, 1020]  # once each


def test_no_thread_pins_before_the_engine_runs():
    """vLLM captures its graphs until then: memory that is registered meanwhile spoils a capture."""
    capturing, refused = False, []
    me = threading.get_ident()

    def register(address, _nbytes):
        if capturing:
            refused.append(address)
            return 900  # cudaErrorStreamCaptureUnsupported
        assert address > 0 or threading.get_ident() == me
        return 0

    threads_before = threading.active_count()
    pinning = Pinning(0, 100, register, Device().unregister, piece_bytes=10)
    pinning.start()
    capturing = True
    assert threading.active_count() == threads_before
    assert pinning.ready == 10
    capturing = False
    pinning.go_on()
    pinning.go_on()
    while pinning.ready < 100:
        pass
    assert not refused
    pinning.close()
    pinning.go_on()
    assert threading.active_count() == threads_before


def test_a_gap_is_not_passed_over():
    """What is behind it is pinned, and yet no slot may lie across it."""
    done, behind = threading.Event(), threading.Event()

    def register(address, _nbytes):
        if address == 10:
            done.wait(10)
        if address == 20:
            behind.set()
        return 0

    pinning = Pinning(0, 30, register, Device().unregister, piece_bytes=10)
    pinning.start()
    pinning.go_on(threads=2)
    assert behind.wait(10)
    assert pinning.ready == 10
    done.set()
    while pinning.running:
        pass
    assert pinning.ready == 30
    pinning.close()
    assert pinning.ready == 0


def test_if_the_first_cannot_be_pinned_the_start_fails():
    device = Device(broken=[1000])
    with pytest.raises(StoreError, match=r"CUDA error 2\).* locked memory"):
        Pinning(1000, 25, device.register, device.unregister, piece_bytes=10).start()


def test_if_a_later_one_cannot_the_rest_stays_unused(caplog):
    device = Device(broken=[1010])
    pinning = Pinning(1000, 400, device.register, device.unregister, piece_bytes=10)
    pinning.start()
    pinning.go_on(threads=2)
    while pinning.running > 1:
        pass  # one fails at once, the other is held at the gate
    device.gate.set()
    while pinning.running:
        pass
    assert pinning.ready == 10
    assert len(device.seen) <= 3, "it went on behind the gap"
    assert "stays unused" in caplog.text
    pinning.close()
    assert 1000 in device.undone and 1010 not in device.undone


def test_who_closes_does_not_wait_for_all_of_it():
    device = Device()
    pinning = Pinning(1000, 10_000, device.register, device.unregister, piece_bytes=10)
    pinning.start()
    pinning.go_on(threads=1)
    for _ in range(2):
        device.reached.acquire(timeout=60)
    threading.Timer(0.01, device.gate.set).start()
    pinning.close()
    assert len(device.seen) < 1000


def test_slots_serve_as_they_become_ready():
    cache = Cache(MODEL, BLOCKS)
    slot_layout = SlotLayout(cache.shard, 0, CHUNK, load("cpu"))
    arena = make(ArenaSpec(4, slot_bytes([slot_layout]), FINGERPRINT))
    ready = 4
    store = HostStore(SlotIndex(arena, lambda: ready), [slot_layout])
    for seed in range(4):
        assert store.store(seed, key_of(seed), 0, (0, 1))
    assert len(store.poll()) == 4
    ready = 2  # as if it had been started again
    assert store.load(9, key_of(1), 0, (2, 3))
    assert not store.load(9, key_of(3), 0, (2, 3)), "the device cannot read it yet"
    for seed in range(4):
        store.drop(key_of(seed))
    store.poll()
    assert [store.store(n, key_of(n), 0, (0, 1)) for n in range(3)] == [True, True, False]
    assert {entry.slot for entry in map(store.index.use, (key_of(0), key_of(1))) if entry} <= {0, 1}
    ready = 4
    assert store.store(5, key_of(5), 0, (0, 1))
    store.poll()
    arena.close()
