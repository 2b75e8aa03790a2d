"""NIXL: one-sided reads and writes over UCX, LIBFABRIC, … (github.com/ai-dynamo/nixl, 1.5).

* Row tables are prepared once per table (``prep_xfer_dlist`` with strided descriptors, one per
  row instead of one per row and block) and reused; a transfer only names indices. NIXL joins
  rows that are neighbours on both sides.
* Posting takes 1 to 3 µs a descriptor, in the thread that also answers everybody else. So a
  transfer is posted slice by slice, `POST_S` in each poll, the transfers that have slices left in
  turn; a slice is a NIXL transfer of its own.
* No progress thread: `poll` makes progress, so an idle engine costs nothing. With UCX even a
  passive side must poll for a peer's read to end (its flush needs an answer).
* UCX must really read and write host memory (RDMA, shared memory; over TCP only writes are real).
  What it emulates, the peer answers with messages, and if we die meanwhile UCX 1.23 ends *its*
  process (a reply that cannot be sent is fatal, or freed wrongly, in ``ucp_request.c``). So
  emulation is off, a read that would need it fails, and the mover stages instead, which writes.
  Device memory has no other way over TCP and keeps it; UCX_PROTO_EMULATION_ENABLE overrules both.
* A transfer ends when NIXL says DONE or a backend error, never before: it is not released, and
  its peer's metadata is not removed, while it runs. Removing it makes NIXL *report* an end
  (NOT_FOUND) while bytes still arrive. A peer that was dropped and stays silent is fenced off by
  making the whole agent anew, which does stop them.

What was rejected:

* A list of descriptors for each transfer, as vLLM's own connector makes it (``block × row`` of
  them, up to 112,000): posting them is most of what it takes (vllm#55434). A table costs once.
* NIXL's progress thread: it spins, a whole core for an idle engine, and the mover polls anyway.
* NIXL's notifications for "I have read it": they need the peer's agent, say nothing of the lease,
  and a late one looks like any other. Leases are closed over the control channel.
* Cancelling by releasing the handle: UCX goes on writing what is on the wire, into blocks that
  vLLM has given to somebody else by then. A cancelled transfer is waited for.
* ``remove_remote_agent`` as the fence of a silent peer, for the reason above.
* Emulated reads over TCP, for the reason above: in three of three runs of 15 kills a side that was
  read ended with its reader (docs/transports.md, "NIXL over TCP: written, not read").
"""

import gc
import logging
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from kvconnect.config import NixlOptions, parse_transport_options
from kvconnect.errors import ConfigError, TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport.base import Done, TransferId, Work
from kvconnect.transport.greeting import read_hello

logger = logging.getLogger(f"vllm.{__name__}")

LOCAL = "NIXL_INIT_AGENT"
FENCE_S = 20.0  # that a dropped peer's transfers get to end by themselves
CLOSE_S = 2.0  # that all get when the transport is closed
POST_S = 0.002  # for posting, between two polls
SLICE_LIMITS = 64, 4096  # descriptors, at least and at most; the first slices have the fewest


def _import_nixl() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        from nixl import _api, _bindings
    except ImportError as e:
        raise ConfigError(
            "the nixl transport needs the nixl package, which cannot be imported "
            f"({e}); run `pip install 'kvconnect[nixl]'`"
        ) from e
    errors = [e for name, e in vars(_bindings).items() if name.endswith("Error")]
    return _api, tuple(errors)  # NIXL's exceptions have no common base of their own


class _NixlHello(msgspec.Struct):
    agent: str
    metadata: bytes


@dataclass
class _NixlTransfer:
    work: Work
    started: float
    post_s: float = 0.0
    posted: int = 0  # rows of the work whose slices are posted
    handles: deque[Any] = field(default_factory=deque)  # of slices under way, oldest first
    descriptors: int = 0
    error: str | None = None

    @property
    def rows_left(self) -> int:
        """How many rows are to be posted; none once it has failed."""
        return 0 if self.error else len(self.work.local_index) - self.posted


class NixlTransport:
    """See `kvconnect.transport.base`. Raises ConfigError if a backend is not available."""

    def __init__(self, regions: Sequence[Region], options: NixlOptions | None = None) -> None:
        self._api, self._errors = _import_nixl()
        self._regions, self._backends = tuple(regions), (options or NixlOptions()).backends
        self._peers: dict[str, _NixlHello] = {}  # by the name that add_peer gave
        self._dropped: dict[str, tuple[_NixlHello, float]] = {}  # with transfers; until when
        # (peer, id of a table of either side) → the table, so that the id stays its own, handle
        self._prepared: dict[tuple[str, int], tuple[RowTable, Any]] = {}
        self._running: dict[TransferId, _NixlTransfer] = {}
        self._to_post: deque[TransferId] = deque()  # with rows left, whose turn is next first
        self._spent_s = 0.0  # for posting, since the last poll
        self._row_s = POST_S / 2 / SLICE_LIMITS[0]  # what posting a row takes, at most
        self._ended: list[Done] = []
        self._next_id = 1
        self._closed = False
        self._make_agent()

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(_NixlHello(self._name, self._metadata))

    def add_peer(self, name: str, hello: bytes) -> None:
        theirs = read_hello(name, hello, _NixlHello)
        for known in (*self._peers.values(), *(h for h, _ in self._dropped.values())):
            if known.agent == theirs.agent and known != theirs:
                raise TransportError(f"peer {name}: another peer is NIXL agent {theirs.agent}")
        try:
            added = self._agent.add_remote_agent(theirs.metadata)
            agent = added.decode() if isinstance(added, bytes) else added
        except self._errors_or(ValueError, TypeError) as e:
            raise TransportError(f"peer {name}: its NIXL metadata is unusable: {e}") from e
        if agent != theirs.agent:
            raise TransportError(f"peer {name}: metadata is of agent {agent}, not {theirs.agent}")
        self._peers[name] = theirs

    def drop_peer(self, name: str) -> None:
        hello = self._peers.pop(name, None)
        if hello is None:
            return
        for running in self._running.values():
            if running.work.peer == name:
                running.error = running.error or f"peer {name} was dropped"
        self._dropped[name] = (hello, time.monotonic() + FENCE_S)
        self._forget_dropped()

    def submit(self, work: Work) -> TransferId:
        transfer_id, self._next_id = self._next_id, self._next_id + 1
        if work.peer not in self._peers:
            self._ended.append(Done(transfer_id, f"peer {work.peer} is not reachable"))
            return transfer_id
        self._running[transfer_id] = _NixlTransfer(work, time.perf_counter())
        self._to_post.append(transfer_id)
        self._post()
        return transfer_id

    def poll(self) -> list[Done]:
        self._spent_s = 0.0
        self._post()
        self._advance()
        self._agent.get_new_notifs()  # progress for peers that read from us
        if self._dropped:
            self._forget_dropped()
            if any(time.monotonic() >= until for _, until in self._dropped.values()):
                self._fence()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer_id: TransferId) -> None:
        if running := self._running.get(transfer_id):
            running.error = running.error or "cancelled"

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + CLOSE_S
        for running in self._running.values():
            if running.rows_left:
                running.error = "transport closed"
        while self._running and time.monotonic() < deadline:
            self._advance()
            time.sleep(0.001)
        self._end_all("transport closed")
        self._drop_agent()

    def _errors_or(self, *more: type[Exception]) -> tuple[type[Exception], ...]:
        return (*self._errors, *more)

    # -- the agent ----------------------------------------------------------------------

    def _make_agent(self) -> None:
        self._name = str(uuid.uuid4())
        config = self._api.nixl_agent_config(
            enable_prog_thread=False, capture_telemetry=True, backends=[]
        )
        try:
            self._agent = self._api.nixl_agent(self._name, config)
            for backend in self._backends:
                if backend in self._agent.get_plugin_list():
                    self._agent.create_backend(backend, self._parameters(backend))
        except self._errors_or(RuntimeError) as e:
            raise ConfigError(
                f"NIXL cannot start with backends {', '.join(self._backends)}: {e}; if UCX_TLS "
                "or UCX_NET_DEVICES is set, does it name what this host has?"
            ) from e
        absent = [b for b in self._backends if b not in self._agent.backends]
        if absent:
            raise ConfigError(
                f"backends: NIXL has no plugin {', '.join(absent)}, it has "
                f"{', '.join(sorted(self._agent.get_plugin_list()))}; name one of those, or "
                "install a nixl build that brings it"
            )
        for kind in {r.kind for r in self._regions}:
            self._register(kind)
        self._metadata = self._agent.get_agent_metadata()

    def _parameters(self, backend: str) -> dict[str, str]:
        host = all(r.kind == "DRAM" for r in self._regions)
        return {"engine_config": "PROTO_EMULATION_ENABLE=n"} if backend == "UCX" and host else {}

    def _register(self, kind: str) -> None:
        rows = [(r.address, r.nbytes, r.device, "") for r in self._regions if r.kind == kind]
        try:
            self._agent.register_memory(rows, kind)
        except self._errors as e:
            total = sum(row[1] for row in rows)
            raise ConfigError(
                f"NIXL cannot register {total} bytes of {kind} memory: {e}; is the memlock "
                "limit (`ulimit -l`) high enough, and do the backends support this memory?"
            ) from e

    def _drop_agent(self) -> None:
        """Destroy the agent and with it all registrations, peers and transfers."""
        self._peers.clear()
        self._dropped.clear()
        self._prepared.clear()
        self._agent = None
        gc.collect()  # the agent ends with its last handle; see that that is now

    def _fence(self) -> None:
        logger.error(
            "a dropped peer's transfers did not end in %g s: the NIXL agent is made anew, and all "
            "peers are greeted again",
            FENCE_S,
        )
        self._end_all("the NIXL agent was made anew")
        self._drop_agent()
        self._make_agent()

    # -- transfers ----------------------------------------------------------------------

    def _post(self) -> None:
        """Post slices of the transfers that have some, in turn, as long as there is time."""
        while self._to_post and self._spent_s < POST_S:
            transfer_id = self._to_post.popleft()
            running = self._running.get(transfer_id)
            if running is None:
                continue
            if running.rows_left:
                began = time.perf_counter()
                rows = self._post_slice(running)
                took_s = time.perf_counter() - began
                self._spent_s += took_s
                running.post_s += took_s
                # by halves, towards what was measured: a first slice pays for what is set up once
                self._row_s += (took_s / max(rows, 1) - self._row_s) / 2
            if running.rows_left:
                self._to_post.append(transfer_id)
            else:
                self._check(transfer_id, running)

    def _post_slice(self, running: _NixlTransfer) -> int:
        """Post the next slice; returns how many rows it has."""
        work, least = running.work, SLICE_LIMITS[0]
        rows = min(max(int(POST_S / 2 / max(self._row_s, 1e-9)), least), SLICE_LIMITS[1])
        part = slice(running.posted, running.posted + min(rows, running.rows_left))
        running.posted = part.stop
        try:
            agent = self._agent_of(work.peer)
            handle = self._agent.make_prepped_xfer(
                work.op.value,
                self._prepare(work.peer, work.local, LOCAL),
                work.local_index[part],
                self._prepare(work.peer, work.remote, agent),
                work.remote_index[part],
            )
        except self._errors_or(TransportError, ValueError, KeyError, OverflowError) as e:
            running.error = f"NIXL refused the transfer: {e}"
            return 1
        running.handles.append(handle)
        try:
            if self._agent.transfer(handle) == "ERR":
                running.error = "NIXL transfer ended as ERR"
        except self._errors as e:
            # part of it may be on the wire: poll tells when it has ended
            logger.warning("NIXL could not post all of a transfer: %s", e)
            running.error = f"NIXL could not post all of the transfer: {e}"
        return part.stop - part.start

    def _advance(self) -> None:
        for transfer_id, running in list(self._running.items()):
            self._check(transfer_id, running)

    def _check(self, transfer_id: TransferId, running: _NixlTransfer) -> None:
        """Take in the slices that have ended; end the transfer if that is all."""
        while running.handles:
            handle = running.handles[0]
            try:
                state = self._agent.check_xfer_state(handle)
                if state == "DONE":
                    running.descriptors += self._agent.get_xfer_telemetry(handle).descCount
            except self._errors as e:
                state = str(e)
            if state == "PROC":
                return
            if state != "DONE":
                running.error = running.error or f"NIXL transfer ended as {state}"
            self._release(running.handles.popleft(), "transfer")
        if not running.rows_left:
            self._end(transfer_id)

    def _agent_of(self, peer: str) -> str:
        if peer not in self._peers:
            raise TransportError(f"peer {peer} is not reachable")
        return self._peers[peer].agent

    def _prepare(self, peer: str, table: RowTable, agent: str) -> Any:
        key = (peer, id(table))
        if key not in self._prepared:
            address, nbytes, stride, count = table.rows.T
            device = np.full_like(address, table.device)
            rows = np.column_stack([address, nbytes, device, stride, count]).astype(np.uint64)
            handle = self._agent.prep_xfer_dlist(agent, rows, table.kind)
            self._prepared[key] = (table, handle)
        return self._prepared[key][1]

    def _forget_dropped(self) -> None:
        """Let go of dropped peers that nothing runs on any more."""
        in_use = {r.work.peer for r in self._running.values()}
        for name in [n for n in self._dropped if n not in in_use]:
            hello, _ = self._dropped.pop(name)
            for key in [k for k in self._prepared if k[0] == name]:
                self._release(self._prepared.pop(key)[1], "prepared list")
            others = (*self._peers.values(), *(h for h, _ in self._dropped.values()))
            if any(other.agent == hello.agent for other in others):
                continue  # another name of the same peer
            try:
                self._agent.remove_remote_agent(hello.agent)
            except self._errors as e:
                logger.warning("peer %s: NIXL could not forget it: %s", name, e)

    def _end(self, transfer_id: TransferId) -> None:
        r = self._running.pop(transfer_id)
        wire_s = time.perf_counter() - r.started
        nbytes = 0 if r.error else r.work.nbytes
        descriptors = 0 if r.error else r.descriptors
        self._ended.append(Done(transfer_id, r.error, nbytes, descriptors, r.post_s, wire_s))

    def _end_all(self, why: str) -> None:
        self._ended += [Done(transfer_id, why) for transfer_id in self._running]
        self._running.clear()
        self._to_post.clear()

    def _release(self, handle: Any, what: str) -> None:
        try:
            handle.release()
        except self._errors as e:
            logger.warning("NIXL could not release a %s: %s", what, e)


def make(regions: Sequence[Region], _host: str, options: Mapping[str, Any]) -> NixlTransport:
    """For `registry`; NIXL's backends find out their addresses themselves."""
    return NixlTransport(regions, parse_transport_options(options, NixlOptions, "nixl"))
