"""NIXL: one-sided reads and writes over UCX, LIBFABRIC, … (github.com/ai-dynamo/nixl, 1.5).

* Row tables are prepared once per table (``prep_xfer_dlist`` with strided descriptors, one per
  row instead of one per row and block) and reused; a transfer only names indices. NIXL joins
  rows that are neighbours on both sides.
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
"""

import gc
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    handle: Any
    posted_at: float
    post_s: float
    cancelled: bool = False


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
            running.cancelled |= running.work.peer == name
        self._dropped[name] = (hello, time.monotonic() + FENCE_S)
        self._forget_dropped()

    def submit(self, work: Work) -> TransferId:
        transfer_id, self._next_id = self._next_id, self._next_id + 1
        started = time.perf_counter()
        try:
            agent = self._agent_of(work.peer)
            handle = self._agent.make_prepped_xfer(
                work.op.value,
                self._prepare(work.peer, work.local, LOCAL),
                work.local_index,
                self._prepare(work.peer, work.remote, agent),
                work.remote_index,
            )
        except self._errors_or(TransportError, ValueError, KeyError, OverflowError) as e:
            self._ended.append(Done(transfer_id, f"NIXL refused the transfer: {e}"))
            return transfer_id
        running = self._running[transfer_id] = _NixlTransfer(work, handle, started, 0.0)
        try:
            state = self._agent.transfer(handle)
        except self._errors as e:
            # part of it may be on the wire: poll tells when it has ended
            logger.warning("NIXL could not post all of a transfer: %s", e)
            running.cancelled, state = True, "PROC"
        running.post_s = time.perf_counter() - started
        if state != "PROC":
            self._end(transfer_id, state)
        return transfer_id

    def poll(self) -> list[Done]:
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
            running.cancelled = True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + CLOSE_S
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

    def _advance(self) -> None:
        for transfer_id, running in list(self._running.items()):
            try:
                state = self._agent.check_xfer_state(running.handle)
            except self._errors as e:
                state = str(e)
            if state != "PROC":
                self._end(transfer_id, state)

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

    def _end(self, transfer_id: TransferId, state: str) -> None:
        running = self._running.pop(transfer_id)
        wire_s = time.perf_counter() - running.posted_at
        descriptors = 0
        if state == "DONE":
            descriptors = self._agent.get_xfer_telemetry(running.handle).descCount
        self._release(running.handle, "transfer")
        error = None if state == "DONE" else f"NIXL transfer ended as {state}"
        if running.cancelled:
            error = error or "cancelled"
        nbytes = 0 if error else running.work.nbytes
        self._ended.append(Done(transfer_id, error, nbytes, descriptors, running.post_s, wire_s))

    def _end_all(self, why: str) -> None:
        self._ended += [Done(transfer_id, why) for transfer_id in self._running]
        self._running.clear()

    def _release(self, handle: Any, what: str) -> None:
        try:
            handle.release()
        except self._errors as e:
            logger.warning("NIXL could not release a %s: %s", what, e)


def make(regions: Sequence[Region], _host: str, options: Mapping[str, Any]) -> NixlTransport:
    """For `registry`; NIXL's backends find out their addresses themselves."""
    return NixlTransport(regions, parse_transport_options(options, NixlOptions, "nixl"))
