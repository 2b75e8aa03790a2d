"""vLLM's own scheduler while blocks are lent: it resets its prefix cache, and it pauses."""

import signal
import time

import pytest
from test_multi import child
from vllm.v1.core.sched.interface import PauseState
from vllm_scheduler import PREFILL, EngineCore

from kvconnect.orders import Grant, RenewLease, Revoke
from kvconnect.vllm import _compat, leaving, lent

PAUSES = [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW]


@pytest.fixture
def core():
    return EngineCore()


def orders_of(metadata):
    return metadata.take()


@pytest.fixture
def asked_to_end(monkeypatch):
    """Calling it says that the process was asked to end, so many seconds ago."""

    def say(seconds_ago=0.0):
        monkeypatch.setattr(leaving, "asked_at", time.monotonic() - seconds_ago)

    return say


def test_a_reset_revokes_leases_and_their_blocks_are_free(core):
    """Used to be: False until the last lease was over, up to an hour where it was renewed."""
    core.lend("a")
    core.lend("b", first=100)
    (granted,) = orders_of(core.step())
    assert isinstance(granted, Grant) and core.blocks_in_use == 6
    assert core.scheduler.reset_prefix_cache()
    assert core.blocks_in_use == 0
    (revoked,) = orders_of(core.step())
    assert isinstance(revoked, Revoke) and len(revoked.lease_ids) == 2
    assert granted.terms.lease_id in revoked.lease_ids


def test_blocks_of_revoked_leases_are_freed_once(core):
    """vLLM frees them again when the workers say that the requests are sent: others own them."""
    core.lend("a")
    assert core.scheduler.reset_prefix_cache()
    core.add("b", max_tokens=9)
    core.step()
    used = core.blocks_in_use
    assert used == 3
    core.step(finished_sending={"a"})
    assert core.blocks_in_use == used
    assert list(core.scheduler.requests) == ["b"] and not core.connector.lent()


def test_a_reset_that_preempts_succeeds_with_leases_out(core):
    """Used to be a RuntimeError, HTTP 500."""
    core.lend("a")
    core.add("b", first=100, max_tokens=9)
    core.step()
    assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert core.blocks_in_use == 0


def test_a_reset_that_cannot_succeed_revokes_nothing(core):
    core.lend("a")
    core.add("b", first=100, max_tokens=9)
    core.step()
    assert not core.scheduler.reset_prefix_cache()
    assert not any(isinstance(o, Revoke) for o in orders_of(core.step()))
    assert core.blocks_in_use == 6


def test_a_second_reset_revokes_nothing_twice(core):
    core.lend("a")
    assert core.scheduler.reset_prefix_cache() and core.scheduler.reset_prefix_cache()
    orders = orders_of(core.step())
    assert [type(o) for o in orders].count(Revoke) == 1


@pytest.mark.parametrize("state", PAUSES, ids=lambda s: s.name)
def test_lent_blocks_are_no_work_for_a_paused_engine(core, state):
    """Used to be: a pause lasted until the last lease was over (30 s and more)."""
    core.lend("a")
    core.step()
    assert core.scheduler.has_requests(), "it steps, to hear that they are over"
    core.scheduler.set_pause_state(state)
    assert not core.scheduler.has_requests()
    assert core.blocks_in_use == 3, "and they stay lent"
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert core.scheduler.has_requests()
    core.step(finished_sending={"a"})
    core.step()
    assert not core.scheduler.has_requests() and core.blocks_in_use == 0


@pytest.mark.parametrize("state", PAUSES, ids=lambda s: s.name)
def test_a_paused_engine_waits_for_what_is_not_lent(core, state):
    core.lend("a")
    core.add("b", first=100, max_tokens=9)
    core.step()
    core.scheduler.set_pause_state(state)
    assert core.scheduler.has_requests() is (state is PauseState.PAUSED_NEW), "b drains"


@pytest.mark.parametrize("state", PAUSES, ids=lambda s: s.name)
def test_who_waits_at_a_paused_engine_is_made_known_to_its_movers(core, state):
    """Used to be: their leases ran out while the engine was paused, 4 of 4 were HTTP 500."""
    core.lend("a")
    decode = EngineCore()
    decode.scheduler.set_pause_state(state)
    decode.step()
    assert not decode.scheduler.has_requests()
    decode.add("d", core.answers["a"])
    assert decode.scheduler.has_requests()
    (renew,) = orders_of(decode.step())
    assert isinstance(renew, RenewLease) and renew.request_id == "d"
    assert not decode.scheduler.has_requests(), "once, and then it is still"


def test_a_scheduler_that_is_not_known_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(_compat, "scheduler_class", lambda: None)
    assert not lent.watch()
    assert "scheduler is not known" in caplog.text


def test_watching_twice_changes_nothing():
    lent.watch()
    cls = _compat.scheduler_class()
    before = cls.has_finished_requests, cls.reset_prefix_cache
    assert lent.watch()
    assert (cls.has_finished_requests, cls.reset_prefix_cache) == before


# -- asked to end ----------------------------------------------------------------------------


def test_an_engine_that_ends_gives_no_new_leases_and_keeps_its_promises(core, asked_to_end):
    core.add("promised", PREFILL)
    asked_to_end()
    core.add("late", PREFILL, first=100)
    core.step()
    assert list(core.connector.lent()) == ["promised"]
    assert core.answers["promised"] and core.answers["late"] is None


def test_leases_of_an_engine_that_ends_run_out_at_the_drain_timeout(asked_to_end):
    core = EngineCore(drain_timeout=5)
    core.lend("a")
    core.step()
    asked_to_end(4)
    assert orders_of(core.step()) == []
    asked_to_end(6)
    assert [type(o) for o in orders_of(core.step())] == [Revoke]
    assert orders_of(core.step()) == [], "once"
    core.step(finished_sending={"a"})
    core.step()
    assert not core.scheduler.has_requests(), "and vLLM ends the engine"


@pytest.mark.parametrize(("allowed", "drain_s"), [(0, 30), (60, 30), (20, 18), (1, 0)])
def test_an_engine_has_drained_before_vllm_kills_it(allowed, drain_s):
    core = EngineCore(shutdown_timeout=allowed)
    assert core.connector.scheduler.drain_s == drain_s


def test_vllms_signal_handler_is_noted_and_called(monkeypatch):
    called = []

    def handler(number, frame):
        called.append(number)

    def users(number, frame):
        raise AssertionError

    monkeypatch.setattr(leaving, "asked_at", None)
    handler.__module__ = "vllm.v1.engine.core"
    before = signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGINT, users)
    try:
        leaving.watch()
        leaving.watch()
        assert signal.getsignal(signal.SIGINT) is users, "only vLLM's"
        assert leaving.asked_at is None
        signal.raise_signal(signal.SIGTERM)
        first = leaving.asked_at
        assert called == [signal.SIGTERM] and first is not None
        signal.raise_signal(signal.SIGTERM)
        assert leaving.asked_at == first, "the time of the first"
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


# -- several connectors ----------------------------------------------------------------------


def multi(*children):
    return EngineCore("KVConnectMulti", connectors=list(children))


def ours(name):
    return child(name) | {"kv_connector_module_path": "kvconnect.vllm"}


def test_a_reset_revokes_the_leases_of_all_children():
    core = multi(ours("KVConnectNixl"), ours("KVConnectMooncake"))
    core.lend("a")
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    core.step()
    assert not core.scheduler.has_requests()
    assert core.scheduler.reset_prefix_cache() and core.blocks_in_use == 0
    told = [orders_of(one) for one in core.step().metadata]
    assert [[type(o) for o in orders] for orders in told] == [[Revoke], [Revoke]]
    core.connector.shutdown()  # Mooncake's endpoint has a thread


def test_what_another_connector_saves_too_is_not_freed_under_it():
    core = multi(ours("KVConnectNixl"), child("HybridChild", finished=(True, None)))
    core.lend("a")
    assert not core.scheduler.reset_prefix_cache() and core.blocks_in_use == 3
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    core.step()
    assert core.scheduler.has_requests(), "the pause waits for what is saved"
    core.step(finished_sending={"a"})
    core.step()
    assert not core.scheduler.has_requests() and core.blocks_in_use == 0
