"""NIXL: one-sided reads and writes over UCX, LIBFABRIC, … (github.com/ai-dynamo/nixl, 1.5).

* Row tables are prepared once per table (``prep_xfer_dlist`` with strided descriptors, one per
  row instead of one per row and block) and reused; a transfer only names indices. NIXL joins
  rows that are neighbours on both sides.
* No progress thread: `poll` makes progress, so an idle engine costs nothing. With UCX even a
  passive side must poll for a peer's read to end (its flush needs an answer).
* A transfer is never released while it runs: UCX cannot take back a read that is on the wire,
  so `cancel` lets it end and then calls it failed.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from kvconnect.blocks import Region
from kvconnect.errors import ConfigError, TransportError
from kvconnect.plan import RowTable
from kvconnect.transport.base import Done, Ticket, Work

logger = logging.getLogger(__name__)

LOCAL = "NIXL_INIT_AGENT"


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


class _Hello(msgspec.Struct):
    agent: str
    metadata: bytes


@dataclass
class _Running:
    work: Work
    handle: Any
    posted_at: float
    post_s: float
    cancelled: bool = False


class NixlTransport:
    """See `kvconnect.transport.base`. Raises ConfigError if a backend is not available."""

    def __init__(self, regions: Sequence[Region], backends: Sequence[str] = ("UCX",)) -> None:
        api, self._error = _import_nixl()
        self._name = str(uuid.uuid4())
        config = api.nixl_agent_config(
            enable_prog_thread=False, capture_telemetry=True, backends=list(backends)
        )
        self._agent = api.nixl_agent(self._name, config)
        absent = [b for b in backends if b not in self._agent.backends]
        if absent:
            raise ConfigError(
                f"backends: NIXL has no plugin {', '.join(absent)}, it has "
                f"{', '.join(sorted(self._agent.get_plugin_list()))}; name one of those, or "
                "install a nixl build that brings it"
            )
        self._registered = [self._register(kind, regions) for kind in {r.kind for r in regions}]
        self._metadata = self._agent.get_agent_metadata()
        self._peers: dict[str, str] = {}  # name that add_peer gave → NIXL agent
        # (peer or LOCAL, id of a table) → the table, so that the id stays its own, and its handle
        self._prepared: dict[tuple[str, int], tuple[RowTable, Any]] = {}
        self._running: dict[Ticket, _Running] = {}
        self._ended: list[Done] = []
        self._next_ticket = 1
        self._closed = False

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(_Hello(self._name, self._metadata))

    def add_peer(self, name: str, hello: bytes) -> None:
        try:
            theirs = msgspec.msgpack.decode(hello, type=_Hello)
            added = self._agent.add_remote_agent(theirs.metadata)
        except (msgspec.DecodeError, *self._error, ValueError, TypeError) as e:
            raise TransportError(f"peer {name}: its NIXL metadata is unusable: {e}") from e
        agent = added.decode() if isinstance(added, bytes) else added
        if agent != theirs.agent:
            raise TransportError(f"peer {name}: metadata is of agent {agent}, not {theirs.agent}")
        self._peers[name] = agent

    def drop_peer(self, name: str) -> None:
        agent = self._peers.pop(name, None)
        if agent is None:
            return
        for running in self._running.values():
            running.cancelled |= running.work.peer == name
        try:
            self._agent.remove_remote_agent(agent)  # disconnects: what is on the wire errs
        except self._error as e:
            logger.warning("peer %s: NIXL could not forget it: %s", name, e)
        self._forget_tables(name)

    def submit(self, work: Work) -> Ticket:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        started = time.perf_counter()
        try:
            handle = self._agent.make_prepped_xfer(
                work.op.value,
                self._prepare(LOCAL, work.local),
                work.local_index,
                self._prepare(work.peer, work.remote),
                work.remote_index,
            )
            state = self._agent.transfer(handle)
        except (*self._error, TransportError, ValueError) as e:
            self._ended.append(Done(ticket, f"NIXL refused the transfer: {e}"))
            return ticket
        now = time.perf_counter()
        running = self._running[ticket] = _Running(work, handle, started, now - started)
        if state != "PROC":
            self._end(ticket, running, state)
        return ticket

    def poll(self) -> list[Done]:
        for ticket, running in list(self._running.items()):
            try:
                state = self._agent.check_xfer_state(running.handle)
            except self._error as e:
                state = str(e)
            if state != "PROC":
                self._end(ticket, running, state)
        self._agent.get_new_notifs()  # progress for peers that read from us
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, ticket: Ticket) -> None:
        if running := self._running.get(ticket):
            running.cancelled = True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for name in list(self._peers):
            self.drop_peer(name)
        for _, handle in self._prepared.values():
            self._release(handle, "prepared list")
        self._prepared.clear()
        for ticket, running in list(self._running.items()):
            self._end(ticket, running, "transport closed")
        for registered in self._registered:
            try:
                self._agent.deregister_memory(registered)
            except self._error as e:
                logger.warning("NIXL could not deregister memory: %s", e)

    def _register(self, kind: str, regions: Sequence[Region]) -> Any:
        rows = [(r.address, r.nbytes, r.device, "") for r in regions if r.kind == kind]
        try:
            return self._agent.register_memory(rows, kind)
        except self._error as e:
            total = sum(row[1] for row in rows)
            raise ConfigError(
                f"NIXL cannot register {total} bytes of {kind} memory: {e}; is the memlock "
                "limit (`ulimit -l`) high enough, and do the backends support this memory?"
            ) from e

    def _prepare(self, owner: str, table: RowTable) -> Any:
        key = (owner, id(table))
        if key not in self._prepared:
            agent = owner if owner == LOCAL else self._peers.get(owner)
            if agent is None:
                raise TransportError(f"peer {owner} is not reachable")
            address, nbytes, stride, count = table.rows.T
            device = np.full_like(address, table.device)
            rows = np.column_stack([address, nbytes, device, stride, count]).astype(np.uint64)
            handle = self._agent.prep_xfer_dlist(agent, rows, table.kind)
            self._prepared[key] = (table, handle)
        return self._prepared[key][1]

    def _forget_tables(self, peer: str) -> None:
        """Release what was prepared for a dropped peer, once nothing runs on it."""
        if any(r.work.peer == peer for r in self._running.values()):
            return
        for key in [k for k in self._prepared if k[0] == peer]:
            self._release(self._prepared.pop(key)[1], "prepared list")

    def _end(self, ticket: Ticket, running: _Running, state: str) -> None:
        del self._running[ticket]
        wire_s = time.perf_counter() - running.posted_at
        descriptors = 0
        if state == "DONE":
            descriptors = self._agent.get_xfer_telemetry(running.handle).descCount
        self._release(running.handle, "transfer")
        if running.work.peer not in self._peers:
            self._forget_tables(running.work.peer)
        error = None if state == "DONE" else f"NIXL transfer ended as {state}"
        if running.cancelled:
            error = error or "cancelled"
        nbytes = 0 if error else running.work.nbytes
        self._ended.append(Done(ticket, error, nbytes, descriptors, running.post_s, wire_s))

    def _release(self, handle: Any, what: str) -> None:
        try:
            handle.release()
        except self._error as e:
            logger.warning("NIXL could not release a %s: %s", what, e)
