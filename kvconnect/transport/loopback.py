"""Peers of one process: the shipped fake that tests use, held to the same contract as NIXL.

Bytes really move, by memmove between the addresses that the rows name, when `poll` is called;
addresses outside the regions of either side are refused, as a NIC would.
"""

import ctypes
import itertools
from collections.abc import Sequence

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Done, Op, TransferId, Work


class Fabric:
    """What connects loopback transports: those made on one fabric reach each other."""

    def __init__(self) -> None:
        self.members: dict[str, LoopbackTransport] = {}
        self.names = itertools.count()


class LoopbackTransport:
    """See `kvconnect.transport.base`."""

    def __init__(self, regions: Sequence[Region], fabric: Fabric) -> None:
        self._regions = tuple(regions)
        self._fabric = fabric
        self._name = f"loopback-{next(fabric.names)}"
        fabric.members[self._name] = self
        self._peers: dict[str, str] = {}  # name that add_peer gave → fabric name
        self._transfers = itertools.count(1)
        self._queued: dict[TransferId, Work] = {}
        self._ended: list[Done] = []

    def hello(self) -> bytes:
        return self._name.encode()

    def add_peer(self, name: str, hello: bytes) -> None:
        if hello.decode(errors="replace") not in self._fabric.members:
            raise TransportError(f"peer {name}: {hello!r} is not on this fabric")
        self._peers[name] = hello.decode()

    def drop_peer(self, name: str) -> None:
        self._peers.pop(name, None)
        for transfer_id, work in list(self._queued.items()):
            if work.peer == name:
                self._end(transfer_id, f"peer {name} was dropped")

    def submit(self, work: Work) -> TransferId:
        transfer_id = next(self._transfers)
        self._queued[transfer_id] = work
        return transfer_id

    def poll(self) -> list[Done]:
        for transfer_id, work in list(self._queued.items()):
            self._end(transfer_id, self._move(work), work.nbytes, len(work.local_index))
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer_id: TransferId) -> None:
        if transfer_id in self._queued:
            self._end(transfer_id, "cancelled")

    def close(self) -> None:
        self._fabric.members.pop(self._name, None)
        for transfer_id in list(self._queued):
            self._end(transfer_id, "transport closed")

    def _end(
        self, transfer_id: TransferId, error: str | None, nbytes: int = 0, rows: int = 0
    ) -> None:
        del self._queued[transfer_id]
        self._ended.append(Done(transfer_id, error, 0 if error else nbytes, rows))

    def _move(self, work: Work) -> str | None:
        peer = self._fabric.members.get(self._peers.get(work.peer, ""))
        if peer is None:
            return f"peer {work.peer} is not reachable"
        ours = list(zip(*work.local.locate(work.local_index), strict=True))
        theirs = list(zip(*work.remote.locate(work.remote_index), strict=True))
        for regions, rows in ((self._regions, ours), (peer._regions, theirs)):
            for address, nbytes in rows:
                if not any(
                    r.address <= address and address + nbytes <= r.address + r.nbytes
                    for r in regions
                ):
                    return f"address {address:#x} lies outside every registered region"
        for (our_address, nbytes), (their_address, their_nbytes) in zip(ours, theirs, strict=True):
            if nbytes != their_nbytes:
                return f"rows of {nbytes} and {their_nbytes} bytes are paired"
            if work.op is Op.READ:
                ctypes.memmove(int(our_address), int(their_address), int(nbytes))
            else:
                ctypes.memmove(int(their_address), int(our_address), int(nbytes))
        return None
