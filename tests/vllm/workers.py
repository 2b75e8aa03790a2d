"""Workers' halves over memory that is not vLLM's, each with its own thread and channel."""

import contextlib
import time
from types import SimpleNamespace

import torch
from kit.engines import TINY

from kvconnect.config import NixlConfig
from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant, RenewLease, Source
from kvconnect.testing import Faulty
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect.vllm import worker as module
from kvconnect.vllm.engine import Rank
from kvconnect.vllm.worker import Worker
from kvconnect_bench.caches import Cache

PATIENCE_S = 60.0


class Engine:
    """A worker's half over memory that is not vLLM's, with its own thread and channel."""

    def __init__(self, monkeypatch, fabric, rank):
        self.cache = Cache(TINY, 8)
        self.transports = []

        def transport(_name, regions, _host, _options):
            self.transports.append(Faulty(LoopbackTransport(regions, fabric)))
            return self.transports[-1]

        def registered(patch):
            patch.setattr(module, "this_rank", lambda: Rank(rank, rank + 1, 0, 1))
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


@contextlib.contextmanager
def engines(monkeypatch, *ranks):
    """Engines that reach each other, each with one worker: of these ranks."""
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.delenv("VLLM_NIXL_SIDE_CHANNEL_PORT", raising=False)
    fabric = Fabric()
    made = [Engine(monkeypatch, fabric, rank) for rank in ranks]
    yield made
    for engine in made:
        engine.worker.close()
