"""Sleep mode of vLLM 0.33: who can follow it, and what happens before memory is given back."""

import time
from types import SimpleNamespace

import pytest
from kit.log_lines import failed_loads
from vllm_scheduler import EngineCore
from workers import PATIENCE_S, engines

from kvconnect.orders import (
    Cancel,
    EngineAddresses,
    Fetch,
    Offer,
    RenewLease,
    Revoke,
    Source,
)
from kvconnect.planner import Planner
from kvconnect.vllm import (
    KVConnectMooncake,
    KVConnectNixl,
    KVConnectOffloading,
    KVConnectP2pNccl,
)
from kvconnect.vllm.worker import RankMetadata


@pytest.mark.parametrize(
    ("connector", "options", "can"),
    [
        (KVConnectNixl, {}, True),
        (KVConnectNixl, {"backends": ["LIBFABRIC"]}, False),
        (KVConnectNixl, {"transport": "ucx"}, False),
        (KVConnectMooncake, {}, False),
        (KVConnectP2pNccl, {"backend": "nccl"}, True),
        (KVConnectP2pNccl, {"backend": "ucx"}, False),
    ],
)
def test_only_who_lets_go_of_memory_says_that_it_can_sleep(connector, options, can):
    """vLLM's default is yes: others would read what is mapped there no more."""
    config = SimpleNamespace(kv_connector=connector.__name__, kv_connector_extra_config=options)
    assert connector.supports_sleep_mode(config) is can


def test_what_registers_no_memory_can_sleep():
    base = getattr(KVConnectOffloading, "supports_sleep_mode", lambda _: True)
    assert base(None)


@pytest.fixture
def pair(monkeypatch):
    with engines(monkeypatch, 0, 0) as made:
        yield made


def test_who_slept_is_another_and_refuses_its_old_tickets(pair):
    p, d = pair
    old, before = p.lend("r", [3, 1], seed=7), p.worker.get_handshake_metadata()
    assert p.worker.build_connector_worker_meta().ranks == {0: before}
    assert p.worker.build_connector_worker_meta() is None
    assert d.fetched("d", old, [5, 2]) is None and d.cache.holds_fill([(0, 5), (1, 2)], 7)
    old = p.lend("unread", [3, 1], seed=8)
    p.sleep()
    p.sleep()  # vLLM may say it twice
    assert p.worker.get_handshake_metadata() is None
    p.cache.fill([3, 1], 9)  # whatever is mapped there
    p.wake()
    p.wake()
    after = p.worker.get_handshake_metadata()
    assert after.key != before.key and len(p.transports) == 2
    told = p.worker.build_connector_worker_meta()
    assert told.ranks == {0: after}, "what in-tree MultiConnector's children go by"
    assert d.fetched("late", old, [5, 2]), "read from what was mapped anew"
    new = p.lend("again", [4, 6], seed=10)
    assert d.fetched("d2", new, [5, 2]) is None and d.cache.holds_fill([(0, 5), (1, 2)], 10)


def test_what_a_sleeper_lent_and_fetched_is_over_once(pair, caplog):
    """vLLM keeps such requests until the worker says so: for ever, it would be.

    Its log said nothing of such a load; of a chain's parts it says nothing still, as ever.
    """
    p, d = pair
    source = p.lend("r", [3, 1], seed=7)
    d.transports[0].plan(done_polls=10**9)
    d.worker.put([RenewLease("d", source), Fetch("d", source, (((0, 5), (1, 2)),), 2, b"d")])
    d.worker.put([Fetch("part#1", source, (((0, 7),),), 1, b"d", chained=True)])
    p.sleep()
    d.sleep()
    (line,) = failed_loads(caplog)
    assert line["request"] == "d" and line["error"] == "the engine went to sleep"
    assert line["peer"] == str(source.shards[0]) and line["cause"] == "asleep"
    assert p.worker.take()[0].sent == {"r"} and not p.worker.take()[0]
    outcome, lost = d.worker.take()
    assert outcome.received == outcome.failed.keys() == {"d", "part#1"}
    assert lost == {5, 2, 7}
    assert outcome.ended_s.keys() == outcome.received and not d.worker.take()[0]
    p.wake()
    assert not p.worker.take()[0]


def test_of_a_load_that_was_cancelled_before_a_sleep_nothing_is_said(pair, caplog):
    """Nobody wants it any more."""
    p, d = pair
    source = p.lend("r", [3, 1], seed=7)
    d.transports[0].plan(done_polls=10**9)
    d.worker.put([RenewLease("d", source), Fetch("d", source, (((0, 5), (1, 2)),), 2, b"d")])
    deadline = time.monotonic() + PATIENCE_S
    while not d.transports[0].submitted and time.monotonic() < deadline:
        time.sleep(0.002)
    d.worker.put([Cancel("d")])
    d.sleep()
    assert d.worker.take()[0].failed.keys() == {"d"}, "it was cut short before"
    assert not failed_loads(caplog)


def test_a_worker_does_not_wait_for_more_while_it_has_what_ended_before_it_slept(pair):
    """vLLM keeps the request meanwhile."""
    p, _ = pair
    p.lend("r", [3, 1], seed=7)
    p.sleep()
    p.wake()
    began = time.monotonic()
    assert p.worker.take(PATIENCE_S)[0].sent == {"r"}
    assert time.monotonic() - began < PATIENCE_S


def test_orders_that_come_while_it_sleeps_are_carried_out_when_it_wakes(pair):
    p, d = pair
    d.sleep()
    source = p.lend("r", [3, 1], seed=7)
    d.worker.put([RenewLease("d", source)])
    d.worker.put([Revoke(("of the mover before",))])
    d.wake()
    assert d.worker.mover.held()["renewals"] == 1
    assert d.fetched("d", source, [5, 2]) is None
    p.heard(lambda outcome: outcome.sent == {"r"})


def test_a_step_with_revoked_leases_begins_once_they_are_over(pair):
    p, _ = pair
    for number in range(20):
        p.lend(f"r{number}", [3, 1], seed=7)
        p.worker.put([Revoke((f"lease of r{number}",))])
        assert p.worker.mover.held()["leases"] == 0


def test_who_cannot_let_go_of_memory_does_not_go_to_sleep(pair, monkeypatch):
    p, _ = pair
    with monkeypatch.context() as patch:
        patch.setattr(p.worker.mover, "close", lambda: False)
        with pytest.raises(RuntimeError, match="cannot go to sleep"):
            p.sleep()
    assert p.worker.get_handshake_metadata() is not None


# -- the scheduler's half --------------------------------------------------------------------


def test_tickets_name_the_ranks_as_they_are_after_sleep():
    core = EngineCore()
    core.lend("before")
    core.connector.set_xfer_handshake_metadata_pp_aware(
        {(0, 0): RankMetadata("127.0.0.1", 7001, 7101, "j")}
    )
    (order,) = (o for o in core.step().take() if isinstance(o, EngineAddresses))
    assert [(at.port, at.key) for at in order.shards] == [(7101, "j")]
    core.lend("after", first=100)
    tickets = [core.answers[name]["kvconnect"] for name in ("before", "after")]
    assert tickets[0] != tickets[1]
    ports = [core.answers[name]["remote_port"] for name in ("before", "after")]
    assert ports == [7000, 7001]


def test_leases_of_requests_that_wait_are_renewed_by_the_new_movers():
    source = Source((), "r", "lease", 5.0)
    planner = Planner()
    planner.addresses_known(())
    planner.renew("waits", Offer(source, 32, b"d"))
    planner.renew("loads", Offer(source, 32, b"d"))
    planner.fetch("loads", ())
    planner.take_orders()
    planner.addresses_known(())
    assert planner.take_orders() == [EngineAddresses(()), RenewLease("waits", source)]
