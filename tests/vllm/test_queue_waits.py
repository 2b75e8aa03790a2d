"""vLLM's processes sleep in steps that compute nothing, and spin in all others, as vLLM has it."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm_scheduler import EngineCore

from kvconnect.vllm import KVConnectNixl, queue_waits
from kvconnect.vllm.connector import Orders

MESSAGE_AFTER_S = 0.05
LONG_MS = 60_000


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MessageQueue, MessageQueue]]:
    """A writer and its reader; vLLM's class is as it was afterwards."""
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    assert queue_waits.watch()
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready)
    ready.start()
    writer.wait_until_ready()
    ready.join()
    yield writer, reader
    queue_waits.sleep(False)


def test_a_reader_sleeps_in_a_step_that_computes_nothing_and_spins_in_others(queue, monkeypatch):
    writer, reader = queue
    yields = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: yields.append(time.sleep(0.001)))

    def spins() -> int:
        """How often a reader that has just read a message looks for the next one."""
        writer.enqueue("first")
        assert reader.dequeue() == "first"
        yields.clear()
        later = threading.Timer(MESSAGE_AFTER_S, writer.enqueue, ["second"])
        later.start()
        assert reader.dequeue() == "second"
        later.join()
        return len(yields)

    assert spins()
    queue_waits.sleep(True)
    assert not spins()
    queue_waits.sleep(False)
    assert spins(), "at once, and not from the next message on"


def test_a_message_whose_notification_was_lost_is_read_all_the_same(queue, monkeypatch):
    """vLLM drops what it is told too fast, and looks itself after five seconds."""
    writer, reader = queue
    monkeypatch.setattr(SpinCondition, "notify", lambda self: None)
    queue_waits.sleep(True)
    later = threading.Timer(0.02, writer.enqueue, ["told nobody"])
    later.start()
    began = time.monotonic()
    assert reader.dequeue() == "told nobody"
    assert time.monotonic() - began < 2.5
    later.join()


def test_after_a_sleep_in_which_nothing_came_it_spins_as_if_it_had_not_slept(queue, monkeypatch):
    writer, reader = queue
    writer.enqueue("just now")
    assert reader.dequeue() == "just now"
    queue_waits.sleep(True)
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.01)
    queue_waits.sleep(False)
    yields = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: yields.append(time.sleep(0.001)))
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.01)
    assert yields


def test_it_is_changed_once(queue):
    changed = SpinCondition.wait
    assert queue_waits.watch() and SpinCondition.wait is changed


def known_wait(self: object, timeout_ms: int | None = None) -> None: ...


def known_read(self: Any) -> None:
    self.last_read = 0.0


@pytest.mark.parametrize(
    "changed",
    [
        {"wait": lambda self, deadline: None},
        {"wait": None},
        {"record_read": lambda self: None},
        {"record_read": None},
    ],
)
def test_a_vllm_that_waits_in_another_way_is_left_as_it_is(monkeypatch, changed):
    known = {"wait": known_wait, "record_read": known_read}
    condition = type("SpinCondition", (), known | changed)
    monkeypatch.setattr(shm_broadcast, "SpinCondition", condition)
    before = condition.wait
    assert not queue_waits.watch()
    assert condition.wait is before
    monkeypatch.setattr(shm_broadcast, "SpinCondition", type("SpinCondition", (), known))
    assert queue_waits.watch(), "nothing else was the reason"


def test_a_vllm_without_such_a_wait_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(shm_broadcast, "SpinCondition")
    assert not queue_waits.watch()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int | None]]:
    """For how many ms at most a process would wait now, where vLLM lets it wait for so many."""
    asked: list[int | None] = []

    def wait(self: object, timeout_ms: int | None = None) -> None:
        asked.append(timeout_ms)

    def now(timeout_ms: int | None = LONG_MS) -> int | None:
        SpinCondition.wait(SimpleNamespace(last_read=0.0), timeout_ms)
        return asked[-1]

    monkeypatch.setattr(SpinCondition, "wait", wait)
    yield now
    queue_waits.sleep(False)


def test_it_sleeps_for_as_long_as_vllm_lets_it_at_most_and_until_it_looks_itself(waits):
    queue_waits.watch()
    queue_waits.sleep(True)
    shorter = queue_waits.SLEEP_MS - 1
    assert [waits(most) for most in (None, LONG_MS, shorter)] == [
        *[queue_waits.SLEEP_MS] * 2,
        shorter,
    ]


def test_a_sleep_that_a_signal_ends_forgets_nothing(waits, monkeypatch):
    def interrupted(self: object, timeout_ms: int | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpinCondition, "wait", interrupted)
    queue_waits.watch()
    queue_waits.sleep(True)
    condition = SimpleNamespace(last_read=7.0)
    with pytest.raises(KeyboardInterrupt):
        SpinCondition.wait(condition)
    assert condition.last_read == 7.0


def test_an_engine_core_sleeps_while_it_computes_nothing(waits):
    core = EngineCore()
    core.add("r")
    core.step()
    assert waits() == LONG_MS
    core.step()
    core.step()
    assert waits() == queue_waits.SLEEP_MS
    core.add("s", first=100)
    core.step()
    assert waits() == LONG_MS, "from the first step on that computes something"


def test_a_worker_sleeps_in_steps_in_which_it_may_wait(waits):
    made = EngineCore().scheduler
    worker = KVConnectNixl(made.vllm_config, KVConnectorRole.WORKER, made.kv_cache_config)
    worker.bind_connector_metadata(Orders([], most_wait_s=0.001))
    assert waits() == queue_waits.SLEEP_MS
    worker.bind_connector_metadata(Orders([]))
    assert waits() == LONG_MS
