"""A rank that reads all of a passive one, time and again: `… TRANSPORT BYTES ADDRESS HELLO`.

Prints how its first read ended, and "reading" whenever its standard input has a line.
"""

import sys
import time

import numpy as np
from passive_rank import make

from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport.base import Op, Work

ROW = 1 << 13


def main(name, nbytes, address, hello):
    memory = np.zeros(nbytes, np.uint8)
    region = Region(int(memory.ctypes.data), nbytes)
    transport = make(name, [region])
    transport.add_peer("peer", hello)
    index = np.arange(nbytes // ROW, dtype=np.int32)
    ours, theirs = (
        RowTable(np.array([[at, ROW, ROW, len(index)]]), np.zeros(1, np.int64), "DRAM", 0)
        for at in (region.address, address)
    )
    work = Work(Op.READ, "peer", ours, index, theirs, index, nbytes)
    transport.submit(work)
    while not (ended := transport.poll()):
        time.sleep(1e-4)
    print("ended", ended[0].error, flush=True)
    sys.stdin.readline()
    transfers = [transport.submit(work) for _ in range(3)]
    for _ in range(200):  # until requests are on their way
        transport.poll()
        time.sleep(1e-3)
    print("reading", len(transfers), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4]))
