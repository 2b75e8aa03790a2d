"""The control channel: small messages between ranks, without blocking.

A `Link` is one conversation with one peer: dialled by us, or arrived. It is encrypted to the
listener's public key, which whoever dials has to know: nobody else reads, alters or repeats its
frames. The channel carries opaque frames; who may say what is decided above it (`listener.py`,
`dialer.py`).

* One thread owns a channel, only `wake` may be called from others.
* `poll` returns what arrived, waiting at most ``timeout_s``; `send` never blocks: a frame that
  cannot be queued, or whose link was dropped, is lost, as on any network. Every exchange above
  is idempotent and retried.
* A dialled link whose connection broke is told by a Frame without data. ZMQ connects again by
  itself. Where nobody is who has the key that was dialled, it is ``refused``, time and again.
* A rank's key port tells anybody the key: any frame on a link that was dialled without one is
  answered with a `wire.KeyTold`, here and not above. No other frame of such a link goes anywhere.
* `dial` raises WireError for an address or a key that cannot be one: it may come from a client.
* `ZmqChannel` is the real one; `kvconnect.testing.Network` makes some in memory, for tests.
"""

import contextlib
import ipaddress
import itertools
import logging
import os
import resource
import secrets
import select
import socket
import threading
from typing import Any, NamedTuple, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvconnect.control import wire
from kvconnect.control.wire import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, Address
from kvconnect.errors import ConfigError, WireError

logger = logging.getLogger(f"vllm.{__name__}")


class Link(NamedTuple):
    """One conversation; ``dialled``: we started it."""

    dialled: bool
    key: bytes


class Frame(NamedTuple):
    """Bytes that arrived on a link; None: its connection broke."""

    link: Link
    data: bytes | None
    refused: bool = False
    """With None: there was no connection, as nobody is there who has the key that was dialled."""


class Channel(Protocol):
    """What listener and dialer need of a control channel; see the module's contract."""

    address: Address
    """Where links arrive, and our key."""
    key_address: Address
    """Where anybody is told that."""

    def dial(self, address: Address) -> Link: ...
    def send(self, link: Link, data: bytes) -> None: ...
    def poll(self, timeout_s: float) -> list[Frame]: ...
    def drop(self, link: Link) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


MAX_FRAMES_A_POLL = 64
MAX_QUESTION_BYTES = 1 << 10  # at the key port
MAX_SOCKETS = 1 << 15  # of a context: three for each rank that is dialled
FILES = 1 << 14  # as many may be open at least, if the system lets us: five for each such rank
SPARE_FILES = 64  # that dialling leaves free: libzmq aborts the process where a context finds none
NAMES = 64  # sockets of one context for hosts that have to be looked up
MAX_QUEUED = 256  # frames that wait inside ZMQ per connection that dialled us
BROKE = zmq.EVENT_DISCONNECTED
# nobody is there, or somebody with another key, so that ZMQ tries again; or no key at all
REFUSED = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
# Of TCP: a host that vanished without a word is noticed after 20 s and 4 × 10 s. Not by heartbeats
# of ZMQ: libzmq 4.3 aborts the process where one is due for a connection that ended while its queue
# was full (`Assertion failed: !_io_error`, libzmq's issue 4364). What was sent and is not
# acknowledged holds TCP's own probes up, and by itself is given up after 15 minutes: so it may be
# as old as an idle link gets. Else nobody would notice a dead link that only carries renewals.
UNACKNOWLEDGED_MS = 60_000
KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 20,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 4,
    zmq.TCP_MAXRT: UNACKNOWLEDGED_MS,
}


class NamedContexts:
    """ZMQ contexts for hosts that have to be looked up.

    * A context looks names up in a thread of its own, where a slow one keeps all others waiting.
    * libzmq 4.3 keeps a file open of each socket whose host was not found, until its context ends;
      and clients may name hosts. So a context is for `NAMES` sockets, and ends when the last of
      them is closed: on a thread, for it waits for the lookups under way.
    """

    def __init__(self) -> None:
        self._sockets: dict[zmq.Context[Any], int] = {}  # open ones
        self._current: zmq.Context[Any] | None = None
        self._left = 0  # sockets that the current one may still have

    def take(self) -> zmq.Context[Any]:
        """The context for another socket."""
        if self._current is None or not self._left:
            previous, self._current, self._left = self._current, zmq.Context(), NAMES
            self._current.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            self._sockets[self._current] = 0
            if previous is not None:
                self._end_unused(previous)
        self._left -= 1
        self._sockets[self._current] += 1
        return self._current

    def give(self, context: zmq.Context[Any]) -> None:
        """A socket of this context was closed."""
        self._sockets[context] -= 1
        self._end_unused(context)

    def close(self) -> None:
        """Close all sockets; frames already sent get 100 ms to leave. Idempotent."""
        for context in self._sockets:
            context.destroy(linger=100)
        self._sockets, self._current = {}, None

    def _end_unused(self, context: zmq.Context[Any]) -> None:
        if context is not self._current and not self._sockets[context]:
            del self._sockets[context]
            threading.Thread(target=context.destroy, args=(100,), daemon=True).start()


class ZmqChannel:
    """A ROUTER socket for whoever dials us, one for the key port, and a DEALER socket per peer.

    * Raises ConfigError where it cannot bind.
    * The server accepts every client's key: who a peer is, `listener.py` finds out.
    * A DEALER names itself by 16 random bytes, under which the ROUTER knows its link. Else ZMQ
      counts, and a stranger could take the name of a link that has ended.
    """

    def __init__(
        self,
        host: str,
        port: int = 0,
        key_port: int = 0,
        bind: str | None = None,
        or_another: bool = False,
    ) -> None:
        """Peers are told ``host``; ``bind``: where to listen, if that is another address.

        ``port`` is that of links; 0 takes a free one, and so for ``key_port``. ``or_another``:
        nobody chose them, so free ones will do where they are taken.
        """
        _allow_files()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._named = NamedContexts()
        self._public_key, self._secret_key = zmq.curve_keypair()
        self._router, self._key_router = self._socket(zmq.ROUTER), self._socket(zmq.ROUTER)
        self._encrypt(self._router)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer's new connection takes its link
        self._key_router.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
        bound = self._bind(self._router, bind or host, port, or_another)
        self.address = Address(host, bound, self._public_key.decode())
        bound = self._bind(self._key_router, bind or host, key_port, or_another)
        self.key_address = Address(host, bound)
        self._told = key_answer(self.address)
        name = f"inproc://wake-{id(self)}"
        self._woken = self._context.socket(zmq.PULL)
        self._woken.bind(name)
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.setsockopt(zmq.LINGER, 0)
        self._waker.connect(name)
        self._epoll = select.epoll()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by the file that says they may be ready
        # to look at in the next poll, whatever their files say; see `poll`
        self._touched: set[zmq.Socket[bytes]] = set()
        for waited in (self._router, self._key_router, self._woken):
            self._watch(waited)
        self._dealers: dict[Link, zmq.Socket[bytes]] = {}
        self._links: dict[zmq.Socket[bytes], Link] = {}  # of dealers and of their monitors
        self._monitors: dict[Link, zmq.Socket[bytes]] = {}
        self._contexts: dict[Link, zmq.Context[Any]] = {}  # of the links to a host by its name
        self._numbers = itertools.count()

    def dial(self, address: Address) -> Link:
        link = Link(True, str(next(self._numbers)).encode())
        context = dealer = None
        try:
            self._check_files()
            if _is_name(address.host):
                context = self._contexts[link] = self._named.take()
            dealer = self._socket(zmq.DEALER, context)
            monitor = dealer.get_monitor_socket(BROKE | REFUSED)
        except (OSError, zmq.ZMQError) as e:  # a peer takes files until its greeting times out
            if dealer is not None:
                dealer.close()
            self._leave_context(link)
            raise WireError(f"{address} cannot be dialled ({e.strerror})") from e
        try:
            if address.key:
                self._encrypt(dealer)
                dealer.setsockopt(zmq.CURVE_SERVERKEY, address.key.encode())
            dealer.setsockopt(zmq.ROUTING_ID, secrets.token_hex(16).encode())
            dealer.connect(f"tcp://{address}")
        except (zmq.ZMQError, UnicodeError) as e:
            dealer.disable_monitor()
            monitor.close()
            dealer.close()
            self._leave_context(link)
            raise WireError(f"{address} cannot be dialled ({e})") from e
        self._dealers[link], self._monitors[link] = dealer, monitor
        for waited in (dealer, monitor):
            self._links[waited] = link
            self._watch(waited)
        return link

    def send(self, link: Link, data: bytes) -> None:
        try:
            if link.dialled:
                if (dealer := self._dealers.get(link)) is not None:
                    self._touched.add(dealer)
                    dealer.send(data, zmq.DONTWAIT)
            else:
                self._touched.add(self._router)
                self._router.send_multipart([link.key, data], zmq.DONTWAIT)
        except zmq.Again:
            logger.warning("control channel: the queue to a peer is full, a frame is lost")
        except zmq.ZMQError as e:
            # EHOSTUNREACH: whoever dialled us has gone; its leases expire
            logger.debug("control channel: frame not sent: %s", e)

    def poll(self, timeout_s: float) -> list[Frame]:
        """See `Channel`. Costs nothing for the sockets on which nothing happened.

        A socket's file tells only that ZMQ has something for the socket to look at, and sending
        looks at it, too: what was touched since the last poll is asked itself.
        """
        ready = {s for s in self._touched if int(s.getsockopt(zmq.EVENTS)) & zmq.POLLIN}
        self._touched.clear()
        for file, _ in self._epoll.poll(0 if ready else max(0.0, timeout_s)):
            ready.add(self._sockets[file])
        frames: list[Frame] = []
        for one in ready:
            for _ in range(MAX_FRAMES_A_POLL):
                try:
                    parts = one.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                self._take(one, parts, frames)
            else:
                self._touched.add(one)  # there may be more
        return frames

    def _take(self, socket: "zmq.Socket[bytes]", parts: list[bytes], frames: list[Frame]) -> None:
        if socket is self._woken:
            return
        if socket in (self._router, self._key_router):
            if len(parts) != 2:  # not ours: dropped
                return
            if socket is self._router:
                frames.append(Frame(Link(False, parts[0]), parts[1]))
            else:
                with contextlib.suppress(zmq.ZMQError):  # who asked has gone, or reads nothing
                    socket.send_multipart([parts[0], self._told], zmq.DONTWAIT)
            return
        link = self._links[socket]
        if socket is self._monitors[link]:
            event = parse_monitor_message(parts)["event"]
            if event & (BROKE | REFUSED):
                frames.append(Frame(link, None, refused=bool(event & REFUSED)))
        elif len(parts) == 1:
            frames.append(Frame(link, parts[0]))

    def _watch(self, socket: "zmq.Socket[bytes]") -> None:
        file = int(socket.getsockopt(zmq.FD))
        self._sockets[file] = socket
        self._epoll.register(file, select.EPOLLIN)
        self._touched.add(socket)  # what came before is not told

    def drop(self, link: Link) -> None:
        if dealer := self._dealers.pop(link, None):
            monitor = self._monitors.pop(link)
            for waited in (dealer, monitor):
                file = int(waited.getsockopt(zmq.FD))
                self._epoll.unregister(file)
                del self._links[waited], self._sockets[file]
                self._touched.discard(waited)
            dealer.disable_monitor()
            monitor.close()
            dealer.close(linger=100)
            self._leave_context(link)

    def _check_files(self) -> None:
        """Raises OSError where fewer than `SPARE_FILES` can be opened."""
        with contextlib.ExitStack() as spare:
            for _ in range(SPARE_FILES):
                spare.callback(os.close, os.dup(self._epoll.fileno()))

    def _leave_context(self, link: Link) -> None:
        if (context := self._contexts.pop(link, None)) is not None:
            self._named.give(context)

    def wake(self) -> None:
        """End a running `poll`. From one other thread at a time."""
        try:
            self._waker.send(b"", zmq.DONTWAIT)
        except zmq.ZMQError:  # full queue: it is awake; terminated: it is closing
            return

    def close(self) -> None:
        """Close all sockets; frames already sent get 100 ms to leave. Idempotent."""
        self._epoll.close()
        self._named.close()
        self._context.destroy(linger=100)

    def _socket(self, kind: int, context: zmq.Context[Any] | None = None) -> zmq.Socket[bytes]:
        made = (context or self._context).socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        largest = MAX_REQUEST_BYTES if kind == zmq.ROUTER else MAX_MESSAGE_BYTES
        made.setsockopt(zmq.MAXMSGSIZE, largest + 1024)
        made.setsockopt(zmq.RCVHWM, MAX_QUEUED)
        made.setsockopt(zmq.SNDHWM, 10_000)
        made.setsockopt(zmq.IPV6, 1)
        for option, value in KEEPALIVE.items():
            made.setsockopt(option, value)
        return made

    def _encrypt(self, socket: "zmq.Socket[bytes]") -> None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)

    def _bind(self, socket: "zmq.Socket[bytes]", host: str, port: int, or_another: bool) -> int:
        try:
            where = _local_endpoint(host)
            socket.bind(f"{where}:{port or '*'}")
        except (zmq.ZMQError, OSError) as e:
            if or_another and e.errno == zmq.EADDRINUSE:
                logger.warning("port %d, the default, is taken: a free one is used", port)
                return self._bind(socket, host, 0, or_another=False)
            self._named.close()
            self._context.destroy(linger=0)
            raise ConfigError(
                f"control channel cannot listen on {host}:{port} ({e.strerror}); set "
                "VLLM_NIXL_SIDE_CHANNEL_HOST to an address of this host, and give every engine on "
                "it a port of its own: VLLM_NIXL_SIDE_CHANNEL_PORT, or unset it for a free one; of "
                "KVConnectP2pNccl kv_port, or 0"
            ) from e
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return int(endpoint.rstrip("\0").rpartition(":")[2])


def key_answer(address: Address) -> bytes:
    """What anybody is answered who asks for the key."""
    told = wire.KeyTold(version=wire.VERSION, port=address.port, key=address.key)
    return wire.PLAIN + wire.encode(told)


def _allow_files() -> None:
    """Raise how many files the process may open, which is often 1,024, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_name(host: str) -> bool:
    """Whether it has to be looked up."""
    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return True
    return False


def _local_endpoint(host: str) -> str:
    """ZMQ endpoint, without the port, that listens where ``host`` leads to.

    A host that is not an address of this machine (a service name, NAT) is advertised as it is,
    and we listen on all interfaces of this host.
    """
    family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            logger.warning("%s is not an address of this host: listening on all interfaces", host)
            return "tcp://*"
    return f"tcp://[{address[0]}]" if family == socket.AF_INET6 else f"tcp://{address[0]}"
