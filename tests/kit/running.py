"""Engines without vLLM: movers on threads, real control channels, a transport in memory."""

import contextlib

import numpy as np

from kvconnect.config import Settings
from kvconnect.control.channel import ZmqChannel
from kvconnect.geometry.blocks import Region
from kvconnect.mover import Mover
from kvconnect.ops import load
from kvconnect.orders import EngineAddresses
from kvconnect.staging import GRANULE_BYTES, Staging
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import Model, engine

HOST = "127.0.0.1"
MODEL = Model(layers=3, heads=4, block_tokens=4, content=8, itemsize=2)
KNOWN = b"what all engines here know"
"""The secret."""


class Running:
    """An engine's movers on their threads."""

    def __init__(self, fabric, model, tp_size, layout, staging, **settings):
        self.caches = engine(model, 8, layout, tp_size)
        self._arenas = []
        self.movers = [self._mover(fabric, i, staging, settings) for i in range(tp_size)]
        self.address = str(self.movers[0].key_address)
        for mover in self.movers:
            mover.put([EngineAddresses(tuple(m.address for m in self.movers))])
            mover.start()

    def _mover(self, fabric, rank, staging, changed):
        fingerprint = {"model": "m", "revision": "None"}
        settings = Settings(rank, len(self.caches), fingerprint, "loopback")
        changed = {"secret": KNOWN} | changed
        settings = settings._replace(versions={"vllm": "0.32.0"}, **changed)
        regions, arena = list(self.caches[rank].shard.regions), None
        if staging:
            self._arenas.append(np.zeros(8 * GRANULE_BYTES, dtype=np.uint8))
            region = Region(int(self._arenas[-1].ctypes.data), self._arenas[-1].nbytes)
            regions, arena = [*regions, region], Staging(region, GRANULE_BYTES)
        return Mover(
            settings,
            self.caches[rank].shard,
            LoopbackTransport(regions, fabric),
            ZmqChannel(HOST, 0),
            staging=arena,
            kernels=load("cpu") if staging else None,
        )

    def close(self):
        for mover in self.movers:
            mover.close()


@contextlib.contextmanager
def running_engines():
    """Starts engines on one fabric; ends them all."""
    fabric = Fabric()
    with contextlib.ExitStack() as ends:

        def make(model=MODEL, tp_size=1, layout="LBHNC", staging=True, **settings):
            made = Running(fabric, model, tp_size, layout, staging, **settings)
            ends.callback(made.close)
            return made

        yield make
