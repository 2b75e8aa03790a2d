"""A transport of another package, as docs/transports.md says: plain TCP, by sockets alone.

A line is a connection. It begins with its address, which replies are sent back along.
"""

import contextlib
import ipaddress
import os
import socket
import struct
from collections import deque

import msgspec

from kvconnect.errors import ConfigError, TransportError
from kvconnect.transport.ucx.messages import MessageTransport

HEAD = struct.Struct("<QQ")  # tag, bytes
ADDRESS_BYTES, PART_BYTES = 16, 1 << 20


class Handle:
    def __init__(self):
        self.completed, self.status = False, 0

    def end(self, status=0):
        if not self.completed:
            self.completed, self.status = True, status


class Connection:
    """Messages over a socket that never blocks."""

    def __init__(self, connected):
        self.socket, self.alive = connected, True
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.leaving = deque()  # (what is left to be sent, its handle if it is its last part)
        self.arrived = bytearray()

    def send(self, data, tag=None):
        handle = Handle()
        if tag is not None:
            self.leaving.append((memoryview(HEAD.pack(tag, len(data))), None))
        self.leaving.append((memoryview(data).cast("B"), handle))
        self.progress()
        return handle

    def progress(self):
        try:
            self._write()
            while self.alive and (part := self.socket.recv(PART_BYTES)):
                self.arrived += part
            self.close()  # the peer closed it
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()

    def _write(self):
        while self.leaving:
            data, handle = self.leaving[0]
            sent = self.socket.send(data)
            if sent < len(data):
                self.leaving[0] = data[sent:], handle
                continue
            self.leaving.popleft()
            if handle:
                handle.end()

    def messages(self):
        """(tag, bytes) of all that have come whole."""
        while len(self.arrived) >= HEAD.size:
            tag, size = HEAD.unpack_from(self.arrived)
            end = HEAD.size + size
            if len(self.arrived) < end:
                return
            yield tag, bytes(self.arrived[HEAD.size : end])
            del self.arrived[:end]

    def close(self):
        self.alive = False
        self.socket.close()
        for _, handle in self.leaving:
            if handle:
                handle.end(-1)
        self.leaving.clear()


class Line:
    """See `kvconnect.transport.ucx.post.Line`."""

    def __init__(self, host, port):
        self.address, self._rooms = os.urandom(ADDRESS_BYTES), {}
        self._connection = Connection(socket.socket())
        self._connection.socket.connect_ex((host, port))  # who refuses is noticed by `progress`
        self._connection.send(self.address)

    @property
    def alive(self):
        return self._connection.alive

    def progress(self):
        if self.alive:
            self._connection.progress()
        for tag, data in self._connection.messages():
            if tag in self._rooms:
                room, handle = self._rooms.pop(tag)
                room[: len(data)] = memoryview(data)
                handle.end()
        if not self.alive:
            self.close()

    def send(self, data, tag):
        if not self.alive:
            raise TransportError("the connection is closed")
        return self._connection.send(data, tag)

    def receive(self, room, tag):
        self._rooms[tag] = room, Handle()
        return self._rooms[tag][1]

    def close(self):
        self._connection.close()
        for _, handle in self._rooms.values():
            handle.end(-1)
        self._rooms.clear()


class Post:
    """See `kvconnect.transport.ucx.post.Post`."""

    def __init__(self, host):
        self._listening = socket.create_server((host, 0))
        self._listening.setblocking(False)
        self.address = msgspec.msgpack.encode(self._listening.getsockname()[:2])
        self._new, self._askers, self._requests = [], {}, deque()

    def dial(self, address):
        try:
            where = msgspec.msgpack.decode(address, type=tuple[str, int])
            ipaddress.IPv4Address(where[0])  # a name would be looked up, which blocks
        except (msgspec.DecodeError, ValueError) as e:
            raise TransportError(f"no address: {e}") from e
        return Line(*where)

    def arrival(self, room, tag):
        self._look()
        if not self._requests:
            return None
        sent_tag, data = self._requests.popleft()
        size = len(data) if sent_tag == tag and len(data) <= len(room) else 0
        room[:size] = memoryview(data[:size])
        handle = Handle()
        handle.end()
        return handle, size

    def _look(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self._new.append(Connection(self._listening.accept()[0]))
        for asker in [c for c in self._new if c.alive]:
            asker.progress()
            if len(asker.arrived) >= ADDRESS_BYTES:
                self._askers[bytes(asker.arrived[:ADDRESS_BYTES])] = asker
                del asker.arrived[:ADDRESS_BYTES]
                self._new.remove(asker)
        for address, asker in list(self._askers.items()):
            asker.progress()
            self._requests += asker.messages()
            if not asker.alive:
                del self._askers[address]

    def reply(self, address, data, tag):
        if address not in self._askers:
            raise TransportError("its asker has gone")
        return self._askers[address].send(data, tag)

    def hang_up(self, address):
        if asker := self._askers.pop(address, None):
            asker.close()

    def close(self):
        self._listening.close()
        for asker in (*self._new, *self._askers.values()):
            asker.close()


def make(regions, host, options):
    """The entry point."""
    if options or any(region.kind != "DRAM" for region in regions):
        raise ConfigError("the acme transport moves host memory only, and has no options")
    return MessageTransport(regions, Post(host))
