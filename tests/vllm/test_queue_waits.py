"""vLLM's processes sleep in steps that compute nothing, and spin in all others, as vLLM has it."""

import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from kvconnect.vllm import queue_waits

MESSAGE_AFTER_S = 0.3


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


def cpu_s_of_a_wait(queue: tuple[MessageQueue, MessageQueue]) -> float:
    """Of a reader that has just read a message, until the next one is there."""
    writer, reader = queue
    writer.enqueue("first")
    assert reader.dequeue() == "first"
    later = threading.Timer(MESSAGE_AFTER_S, writer.enqueue, ["second"])
    later.start()
    began = time.thread_time()
    assert reader.dequeue() == "second"
    spent = time.thread_time() - began
    later.join()
    return spent


@pytest.mark.slow
def test_a_reader_sleeps_in_a_step_that_computes_nothing_and_spins_in_others(queue):
    spins = cpu_s_of_a_wait(queue)
    queue_waits.sleep(True)
    sleeps = cpu_s_of_a_wait(queue)
    queue_waits.sleep(False)
    spins_again = cpu_s_of_a_wait(queue)
    assert 4 * sleeps < min(spins, spins_again)


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
