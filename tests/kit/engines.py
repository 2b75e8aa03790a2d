"""Movers of whole engines in one process, driven by `step`: no threads, no sleeps, no vLLM.

world = World()
prefill, decode = Engine(world, tp_size=2), Engine(world)
lease = prefill.lend("r1", blocks=[3, 1], seed=7)
decode.put(Fetch("r1", prefill.source(lease), (((0, 5), (1, 2)),), 2, lease.digest))
world.go_on()
assert decode.ended == {"r1": [None]}        # one rank, no error
assert decode.caches[0].holds_fill([(0, 5), (1, 2)], seed=7)
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvconnect.config import Mode, Settings
from kvconnect.control.wire import Address
from kvconnect.geometry.blocks import Region
from kvconnect.lease import Terms
from kvconnect.mover import Mover
from kvconnect.ops import Kernels, load
from kvconnect.orders import EngineAddresses, Grant, Order, Outcome, Source
from kvconnect.staging import GRANULE_BYTES, Staging
from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Faulty
from kvconnect.testing.network import Network
from kvconnect.transport.base import Transport
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import Cache, Model, engine

MakeTransport = Callable[[Sequence[Region]], Transport]
TINY = Model(layers=2, heads=2, block_tokens=1, content=2, itemsize=1)


class World:
    """What engines share: time, a control network, a fabric."""

    def __init__(self, held: bool = False, transport: MakeTransport | None = None) -> None:
        """``transport`` makes one for regions; else they are of the fabric."""
        self.clock = FakeClock()
        self.network = Network(held)
        self.fabric = Fabric()
        self.transport = transport or (lambda regions: LoopbackTransport(regions, self.fabric))
        self.engines: list[Engine] = []

    def go_on(self, rounds: int = 12, seconds: float = 0.0) -> None:
        """Everybody steps and every frame arrives, ``rounds`` times; ``seconds`` pass in each."""
        for _ in range(rounds):
            for one in self.engines:
                one.step()
                self.network.flush()
            self.clock.advance(seconds)


class Engine:
    """One engine's movers and memory, at the same addresses over restarts, with other keys."""

    def __init__(
        self,
        world: World,
        model: Model = TINY,
        num_blocks: int = 8,
        layout: str = "LBHNC",
        tp_size: int = 1,
        pp_size: int = 1,
        fingerprint: dict[str, str] | None = None,
        secret: bytes | None = b"a secret of 16 b",
        handshake_timeout_s: float = 3.0,
        load_timeout_s: float = 12.0,
        lease_max_s: float = 20.0,
        mode: Mode = "auto",
        staging: tuple[int, int] | None = None,
        allow_lossy: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        """``staging``: slots, and granules in each; None for an engine that cannot stage.

        ``kernels`` other than this machine's, as those that take their time.
        """
        self.world = world
        self.kernels = kernels or load("cpu")
        self.staging = staging
        self.caches: list[Cache] = engine(model, num_blocks, layout, tp_size, pp_size)
        self.addresses: list[Address] = []
        self.key_addresses: list[Address] = []
        self.settings = Settings(
            rank=0,
            ranks=len(self.caches),
            fingerprint=fingerprint or {"model": "m"},
            transport_name="loopback",
            secret=secret,
            handshake_timeout_s=handshake_timeout_s,
            load_timeout_s=load_timeout_s,
            lease_max_s=lease_max_s,
            mode=mode,
            allow_lossy=allow_lossy,
        )
        world.engines.append(self)
        self.start()

    def start(self) -> None:
        """New movers over the same memory, as after a restart."""
        self.movers: list[Mover] = []
        self.transports: list[Faulty] = []
        self.ended: dict[str, list[str | None]] = {}
        """Fetches that ended: a reason or None per rank, in the order they were reported."""
        self.arenas: list[np.ndarray] = []
        self.sent: list[str] = []
        """Requests whose blocks may be freed, one entry per rank."""
        self.computed: list[str] = []
        """Requests that wait and are computed at their source, likewise."""
        for rank, cache in enumerate(self.caches):
            port = self.addresses[rank].port if rank < len(self.addresses) else 0
            channel = self.world.network.channel("test", port)
            regions = () if self.settings.mode == "staged" else cache.shard.regions
            staging = self._arena()
            if staging is not None:
                regions = (*regions, staging.region)
            transport = Faulty(self.world.transport(regions))
            settings = self.settings._replace(rank=rank)
            mover = Mover(
                settings,
                cache.shard,
                transport,
                channel,
                self.world.clock,
                staging=staging,
                kernels=self.kernels if staging else None,
            )
            self.movers.append(mover)
            self.transports.append(transport)
        self.addresses = [mover.address for mover in self.movers]
        self.key_addresses = [mover.key_address for mover in self.movers]
        self.put(EngineAddresses(tuple(self.addresses)))

    def _arena(self) -> Staging | None:
        if self.staging is None:
            return None
        slots, granules = self.staging
        memory = np.zeros(slots * granules * GRANULE_BYTES, dtype=np.uint8)
        self.arenas.append(memory)
        return Staging(Region(int(memory.ctypes.data), memory.nbytes), granules * GRANULE_BYTES)

    def stop(self) -> None:
        """The engine ends, or dies: its peers hear nothing but the broken connection."""
        for mover in self.movers:
            mover.close()

    def put(self, *orders: Order) -> None:
        """Give orders to all ranks, as a scheduler does."""
        for mover in self.movers:
            mover.put(orders)

    def step(self) -> None:
        """One step of every rank."""
        for rank in range(len(self.movers)):
            self.step_rank(rank)

    def step_rank(self, rank: int) -> Outcome:
        """One step of one rank; notes and returns what it reports."""
        self.movers[rank].step()
        outcome = self.movers[rank].take()
        self.sent += outcome.sent
        self.computed += outcome.computed
        for request_id in outcome.received:
            self.ended.setdefault(request_id, []).append(outcome.failed.get(request_id))
        return outcome

    def lend(self, request_id: str, blocks: Sequence[int], seed: int, ttl_s: float = 5.0) -> Terms:
        """Fill blocks with what ``seed`` stands for, and lease them."""
        for cache in self.caches:
            cache.fill(blocks, seed)
        terms = self.terms(request_id, blocks, seed, ttl_s)
        self.put(Grant(terms))
        return terms

    def terms(self, request_id: str, blocks: Sequence[int], seed: int, ttl_s: float = 5.0) -> Terms:
        """Terms of a lease in one KV cache group; its digest is made of the seed."""
        digest = seed.to_bytes(8, "big")
        lease_id = f"lease_id of {request_id} {seed}"
        return Terms(request_id, lease_id, (tuple(blocks),), len(blocks), digest, ttl_s)

    def source(self, terms: Terms, ticket: bool = True) -> Source:
        """The lease as an offer tells it, with a ticket or in the in-tree form."""
        shards, lease_id = (
            (self.addresses, terms.lease_id) if ticket else (self.key_addresses[:1], None)
        )
        return Source(tuple(shards), terms.request_id, lease_id, terms.ttl_s)
