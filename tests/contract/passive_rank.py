"""A rank in a process of its own that only polls: `python passive_rank.py TRANSPORT BYTES`.

Prints the address of its memory and its hello; ends when its standard input does.
"""

import os
import select
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_gpu

from kvconnect.geometry.blocks import Region
from kvconnect.transport.registry import make_transport


def main(name, nbytes):
    memory = contents(nbytes)
    address = int(memory.ctypes.data)
    transport = make(name, [Region(address, nbytes)])
    print("rank", address, transport.hello().hex(), flush=True)
    while not select.select([sys.stdin], [], [], 50e-6)[0]:
        transport.poll()
    transport.close()


def make(name, regions):
    """A transport; nccl over the fakes in FAKE_GPU, with host memory for a device's."""
    if name != "nccl":
        options = {"mooncake_protocol": "tcp"} if name == "mooncake" else {}
        return make_transport(name, regions, "127.0.0.1", options)
    folder = os.environ["FAKE_GPU"]
    fake_gpu.use(folder)
    regions = fake_gpu.as_device(regions)
    return make_transport(name, regions, "127.0.0.1", fake_gpu.options(folder))


def contents(nbytes):
    return np.random.default_rng(5).integers(0, 256, nbytes, dtype=np.uint8)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
