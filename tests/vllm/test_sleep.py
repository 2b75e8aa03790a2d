"""Sleep mode of vLLM 0.33: who can follow it, and what happens before memory is given back."""

import time
from types import SimpleNamespace

import pytest
import torch
from kit.engines import TINY
from vllm_scheduler import EngineCore

from kvconnect.config import NixlConfig
from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import (
    EngineAddresses,
    Fetch,
    Grant,
    Offer,
    RenewLease,
    Revoke,
    Source,
)
from kvconnect.planner import Planner
from kvconnect.testing import Faulty
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect.vllm import (
    KVConnectMooncake,
    KVConnectNixl,
    KVConnectOffloading,
    KVConnectP2pNccl,
)
from kvconnect.vllm import worker as module
from kvconnect.vllm.engine import Rank
from kvconnect.vllm.worker import RankMetadata, Worker
from kvconnect_bench.caches import Cache

PATIENCE_S = 60.0


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


class Engine:
    """A worker's half over memory that is not vLLM's, with its own thread and channel."""

    def __init__(self, monkeypatch, fabric):
        self.cache = Cache(TINY, 8)
        self.transports = []

        def transport(_name, regions, _host, _options):
            self.transports.append(Faulty(LoopbackTransport(regions, fabric)))
            return self.transports[-1]

        def registered(patch):
            patch.setattr(module, "this_rank", lambda: Rank(0, 1, 0, 1))
            patch.setattr(module, "describe", lambda *_: self.cache.shard)
            patch.setattr(module, "fingerprint", lambda *_: {"model": "m"})
            patch.setattr(module, "make_transport", transport)

        self._patched = registered
        self._monkeypatch = monkeypatch
        config = NixlConfig(transfer_mode="direct", kv_lease_duration=60)
        vllm_config = SimpleNamespace(
            lora_config=None,
            speculative_config=None,
            parallel_config=SimpleNamespace(data_parallel_index=0),
            kv_transfer_config=SimpleNamespace(kv_port=0),
        )
        self.worker = Worker(vllm_config, None, config)
        self.do("register_kv_caches", {"layer": torch.zeros(1)})

    def do(self, name, *args):
        with self._monkeypatch.context() as patch:
            self._patched(patch)
            getattr(self.worker, name)(*args)

    def sleep(self):
        self.do("unregister_kv_caches")

    def wake(self):
        self.do("restore_kv_caches")

    def lend(self, request_id, blocks, seed):
        """Its terms, and where it can be had."""
        here = self.worker.get_handshake_metadata()
        self.cache.fill(blocks, seed)
        terms = Terms(request_id, f"lease of {request_id}", (tuple(blocks),), 2, b"d", 60.0)
        self.worker.put([Grant(terms)])
        address = Address(here.host, here.link_port, here.key)
        return Source((address,), request_id, terms.lease_id, 60.0)

    def fetched(self, request_id, source, blocks):
        """Why it failed; None if it did not."""
        pairs = tuple(enumerate(blocks))
        self.worker.put(
            [RenewLease(request_id, source), Fetch(request_id, source, (pairs,), 2, b"d")]
        )
        outcome = self.heard(lambda found: request_id in found.received)
        return outcome.failed.get(request_id)

    def heard(self, is_it):
        deadline = time.monotonic() + PATIENCE_S
        while not is_it(outcome := self.worker.take()[0]):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return outcome


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.delenv("VLLM_NIXL_SIDE_CHANNEL_PORT", raising=False)
    fabric = Fabric()
    made = [Engine(monkeypatch, fabric) for _ in range(2)]
    yield made
    for engine in made:
        engine.worker.close()


def test_a_worker_that_waits_sees_the_end_of_a_load_when_it_comes(pair):
    p, d = pair
    d.heard = lambda is_it: next(o for _ in range(9) if is_it(o := d.worker.take(3600)[0]))
    assert d.fetched("d", p.lend("r", [3], seed=7), [5]) is None


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


def test_what_a_sleeper_lent_and_fetched_is_over_once(pair):
    """vLLM keeps such requests until the worker says so: for ever, it would be."""
    p, d = pair
    source = p.lend("r", [3, 1], seed=7)
    d.transports[0].plan(done_polls=10**9)
    d.worker.put([RenewLease("d", source), Fetch("d", source, (((0, 5), (1, 2)),), 2, b"d")])
    p.sleep()
    d.sleep()
    assert p.worker.take()[0].sent == {"r"} and not p.worker.take()[0]
    outcome, lost = d.worker.take()
    assert outcome.received == outcome.failed.keys() == {"d"} and lost == {5, 2}
    assert set(outcome.ended_s) == {"d"} and not d.worker.take()[0]
    p.wake()
    assert not p.worker.take()[0]


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
