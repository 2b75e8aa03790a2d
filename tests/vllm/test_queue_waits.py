"""vLLM's processes sleep in steps that compute nothing, and spin in all others, as vLLM has it."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

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


def test_a_timeout_that_is_shorter_ends_the_sleep(queue):
    queue_waits.sleep(True)
    with pytest.raises(TimeoutError):
        queue[1].dequeue(timeout=0.002)


def test_it_is_changed_once(queue):
    changed = SpinCondition.wait
    assert queue_waits.watch() and SpinCondition.wait is changed


class Another:
    """Of a vLLM that waits in another way."""

    def wait(self, deadline: float) -> None: ...


def test_a_vllm_that_waits_in_another_way_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(shm_broadcast, "SpinCondition", Another)
    before = Another.wait
    assert not queue_waits.watch()
    assert Another.wait is before


def test_a_vllm_without_such_a_wait_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(shm_broadcast, "SpinCondition")
    assert not queue_waits.watch()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """For how many ms at most a process would wait now that vLLM lets wait for `LONG_MS`."""
    asked: list[int] = []

    def wait(self: object, timeout_ms: int | None = None) -> None:
        asked.append(timeout_ms or 0)

    def now() -> int:
        SpinCondition.wait(SimpleNamespace(last_read=0.0), LONG_MS)
        return asked[-1]

    monkeypatch.setattr(SpinCondition, "wait", wait)
    yield now
    queue_waits.sleep(False)


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
