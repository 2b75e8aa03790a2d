"""A rank in a process of its own that only polls: `python passive_rank.py TRANSPORT BYTES`.

Prints the address of its memory and its hello; ends when its standard input does.
"""

import select
import sys

import numpy as np

from kvconnect.blocks import Region
from kvconnect.transport.registry import make_transport


def main(name, nbytes):
    memory = contents(nbytes)
    address = int(memory.ctypes.data)
    transport = make_transport(name, [Region(address, nbytes)], "127.0.0.1", {})
    print("rank", address, transport.hello().hex(), flush=True)
    while not select.select([sys.stdin], [], [], 50e-6)[0]:
        transport.poll()
    transport.close()


def contents(nbytes):
    return np.random.default_rng(5).integers(0, 256, nbytes, dtype=np.uint8)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
