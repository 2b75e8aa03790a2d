"""The worker's loop: orders in, bytes moved, outcomes out.

One mover per worker alone owns the transport and the control channel, on a thread of its own,
so that a prefill of 300 ms never delays a pull. The engine's thread only calls `put`, `take`,
`take_stats` and `close`. The thread's body is `step`, which tests call without a thread and
with a fake clock.

* Busy (something is being read, by us or from us): steps follow each other, after a short pause
  where nothing happened. Idle: the thread sleeps in the channel until a frame, an order or a
  deadline; it looks after the transport once a second.
* What is unexpected ends the frame, reader, fetch or remote in whose handling it was raised
  (`kvconnect.errors.contained`). An invariant of ours that does not hold ends the thread, and is
  raised in the engine's thread by the next `take`.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from kvconnect.config import Settings
from kvconnect.consumer.fetch import Fetcher
from kvconnect.consumer.release import Releaser
from kvconnect.consumer.remote import ConsumerContext, PeerPath, Remotes
from kvconnect.consumer.renew import LeaseRenewer
from kvconnect.control import wire
from kvconnect.control.channel import Channel, Frame
from kvconnect.control.dialer import Dialer
from kvconnect.control.listener import Listener
from kvconnect.errors import contained
from kvconnect.geometry.blocks import Shard
from kvconnect.lease import Clock
from kvconnect.loop import Fence, Loop
from kvconnect.ops import Kernels
from kvconnect.orders import (
    Cancel,
    EngineAddresses,
    Fetch,
    Grant,
    Order,
    Outcome,
    Progress,
    Promise,
    Release,
    ReleaseOwn,
    RenewLease,
    Revoke,
    Withdraw,
)
from kvconnect.producer.leases import LeaseServer
from kvconnect.producer.stage import ChunkSender
from kvconnect.staging import Slots, Staging
from kvconnect.stats import Stats, StatsData
from kvconnect.transport.base import Transport

THREAD_NAME = "kvconnect-mover"
IDLE_WAIT_S = 1.0
BUSY_PAUSE_S = 100e-6
SILENT_S, SILENT_PAUSE_S = 1.0, 2e-3
MOVED_S = 1e-3  # a transport whose poll takes so long has posted, and goes on with the next one
AWAIT_S = 0.05  # between looks at whether the thread still runs


class Mover:
    """The worker's loop; the module says what it promises."""

    def __init__(
        self,
        settings: Settings,
        memory: Shard,
        transport: Transport,
        channel: Channel,
        clock: Clock = time.monotonic,
        staging: Staging | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """The mover owns ``transport`` and ``channel`` from now on.

        ``memory`` describes the KV caches of this rank. ``staging`` and ``kernels`` are for the
        staged path, and are given both or not at all.
        """
        self.incarnation = secrets.token_hex(8)
        self.address, self.key_address = channel.address, channel.key_address
        """Where its control channel listens, and where the key of that is told."""
        self._settings = settings
        self._memory = memory
        self._transport = transport
        self._channel = channel
        self._clock = clock
        self._stats = Stats()  # the mover's thread's own
        self._reported = Stats()  # what it has published, guarded by the lock
        self._fenced: deque[tuple[Order, Fence]] = deque()  # orders that wait for the device
        self._active_at = clock()  # when something last moved
        self._shards: tuple[wire.Address, ...] = (channel.address,)
        secret = settings.secret or b""
        self.listener = Listener(channel, settings.fingerprint, self._body, secret)
        self.dialer = Dialer(
            channel, clock, settings.fingerprint, secret, settings.handshake_timeout_s
        )
        self._lease_server = LeaseServer(self.listener, clock, settings.lease_max_s)
        filled, gathered = staging.halves() if staging else (None, None)
        context = ConsumerContext(
            self.dialer,
            transport,
            clock,
            memory,
            settings.rank,
            settings.mode,
            settings.allow_lossy,
            kernels,
            Slots(filled, clock) if filled else None,
        )
        self.receive_slots = context.slots
        """Staging memory that peers write chunks to."""
        self._remotes = Remotes(context)
        self._renewer, self._releaser, self._fetcher = self._make_consumer(context)
        self._chunk_sender = self._make_chunk_sender(gathered, kernels)
        self._loop = Loop(THREAD_NAME, self._turn, channel.wake)
        # guarded by the loop's lock:
        self._orders: deque[tuple[Sequence[Order], Fence | None, tuple[type[Order], ...]]] = deque()
        self._awaited: list[threading.Event] = []
        self._outcome, self._has_ended = Outcome(), threading.Event()
        self._closed = False

    # -- the engine's thread ----------------------------------------------------------

    def start(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Run `step` on a thread until `close`; ``on_start`` is the first thing that it does."""
        self._loop.start(on_start)

    def put(
        self,
        orders: Sequence[Order],
        fence: Fence | None = None,
        fenced: tuple[type[Order], ...] = (Fetch, Progress),
    ) -> None:
        """Give orders; carried out in sequence, those of ``fenced`` once ``fence`` says so.

        A Fetch writes into blocks that steps still running may use. A Grant does not wait: its
        prompt's last token was sampled, so its KV is there; to wait for the step after that one
        would add an unrelated prefill to a decode engine's first token.
        """
        if not orders:
            return
        with self._loop.lock:
            self._orders.append((orders, fence, fenced))
        self._channel.wake()

    def wait_carried_out(self) -> None:
        """Wait until the thread has carried out all that was put, but for what is fenced.

        Raises what stopped the thread, if anything did.
        """
        carried_out = threading.Event()
        with self._loop.lock:
            self._awaited.append(carried_out)
        self._channel.wake()
        while not carried_out.wait(AWAIT_S) and not self._loop.stopping:
            self._loop.check()

    def take(self) -> Outcome:
        """What ended since the last call; raises what stopped the thread, if anything did."""
        self._loop.check()
        with self._loop.lock:
            taken, self._outcome = self._outcome, Outcome()
            self._has_ended.clear()
        return taken

    def wait_for_outcome(self, timeout_s: float) -> bool:
        """Wait until there is something to take; whether there is."""
        return self._has_ended.wait(timeout_s)

    def take_stats(self) -> StatsData | None:
        """What was measured since the last call; None if nothing."""
        with self._loop.lock:
            return self._reported.take()

    def held(self) -> dict[str, int]:
        """How much of everything is in use, by name, at about this moment; from any thread.

        When nothing is under way all of it is 0, but for ``staged_readers``: a peer that has staged
        from us stays known for a while.
        """
        slots, sender = self.receive_slots, self._chunk_sender
        return {
            **self._lease_server.held(),
            **self._fetcher.held(),
            "releases": len(self._releaser),
            "renewals": len(self._renewer),
            "receive_slots": slots.count - slots.free if slots else 0,
            **(sender.held() if sender else {}),
        }

    def paths(self) -> dict[str, list[PeerPath | None]]:
        """How each rank of each greeted engine is read, by the address of its first rank."""
        return self._remotes.paths()

    def close(self) -> bool:
        """Stop the thread, then give up the transport and the channel. Idempotent.

        Returns whether that was done: a thread that did not stop may use the transport still.
        """
        if not self._loop.stopping and self._loop.close():
            self._transport.close()
            self._channel.close()
            self._closed = True
        return self._closed

    # -- the mover's thread -----------------------------------------------------------

    def step(self, wait_s: float = 0.0) -> bool:
        """Do what there is to do now, waiting at most ``wait_s`` for a frame; was there any?"""
        frames = self._channel.poll(wait_s)
        for frame in frames:  # a peer that ended must not be asked for anything more,
            if frame.link.dialled:
                with contained("a frame of a peer", self._count_unexpected):
                    self.dialer.receive(frame)
        self._carry_out_orders()  # and whoever asks us must find what was ordered before
        for frame in frames:
            if not frame.link.dialled:
                with contained("a frame of a reader", self._count_unexpected):
                    self._receive(frame)
        began = self._clock()
        ended = self._transport.poll()
        moved = self._clock() - began >= MOVED_S
        for done in ended:
            self._fetcher.done(done)
            if self._chunk_sender:
                self._chunk_sender.done(done)
        active = bool(frames or ended or moved or (self._chunk_sender and self._chunk_sender.ready))
        if active:
            self._active_at = self._clock()
        self.dialer.tick()
        self._lease_server.tick()
        if self._chunk_sender:
            self._chunk_sender.tick()
        self._tick_consumer()
        self._publish()
        return active

    def _tick_consumer(self) -> None:
        self._remotes.tick()
        changed, ended = self._remotes.take_changed(), self.dialer.calls.take_ended()
        for part in (self._fetcher, self._releaser, self._renewer):
            part.wake_queue.changed(changed)
            part.wake_queue.wake(*ended)
            part.tick()

    def _receive(self, frame: Frame) -> None:
        if incoming := self.listener.receive(frame):
            self._lease_server.receive(incoming)
            if self._chunk_sender:
                self._chunk_sender.receive(incoming)

    def _count_unexpected(self, _why: str) -> None:
        self._stats.count("num_unexpected_errors")

    def wait_s(self) -> float:
        """How long the next step may wait for a frame."""
        if self._busy:
            return 0.0
        fetches, renewals = self._fetcher.wake_queue, self._renewer.wake_queue
        parts = (self.dialer, self._lease_server, self._releaser, fetches, renewals)
        deadlines = [d for part in parts if (d := part.next_deadline()) is not None]
        if self._fenced:
            return 0.001
        soonest = min(deadlines, default=float("inf")) - self._clock()
        return min(max(soonest, 0.001), IDLE_WAIT_S)

    @property
    def _busy(self) -> bool:
        sending = self._chunk_sender is not None and self._chunk_sender.busy
        return self._fetcher.reading or self._lease_server.reading or sending

    def _pause_s(self) -> float:
        """Between busy steps: short while things happen, longer for a reader that went silent."""
        return BUSY_PAUSE_S if self._clock() - self._active_at < SILENT_S else SILENT_PAUSE_S

    def _turn(self) -> None:
        if not self.step(self.wait_s()) and self._busy:
            time.sleep(self._pause_s())

    def _carry_out_orders(self) -> None:
        with self._loop.lock:
            given, self._orders = self._orders, deque()
            awaited, self._awaited = self._awaited, []
        for orders, fence, fenced in given:
            for order in orders:
                if fence is not None and isinstance(order, fenced):
                    self._fenced.append((order, fence))
                else:
                    self._carry_out(order)
        while self._fenced and self._fenced[0][1]():
            self._carry_out(self._fenced.popleft()[0])
        for carried_out in awaited:
            carried_out.set()

    def _revoke(self, order: Revoke) -> None:
        """Revoke leases, and those whose Grant still waits for the device."""
        for waiting in list(self._fenced):
            grant = waiting[0]
            if isinstance(grant, Grant) and grant.terms.lease_id in order.lease_ids:
                self._fenced.remove(waiting)
                self._lease_server.grant(grant.terms)
        self._lease_server.revoke(order.lease_ids)

    def _cancel(self, order: Cancel) -> None:
        """Cancel a fetch, and one that still waits for the device before it reads anything."""
        for waiting in self._fenced:
            fetch = waiting[0]
            if isinstance(fetch, Fetch) and fetch.request_id == order.request_id:
                self._fenced.remove(waiting)
                self._fetcher.fetch(fetch)
                break
        self._fetcher.cancel(order)

    def _carry_out(self, order: Order) -> None:
        match order:
            case Promise():
                self._lease_server.promise(order.name or order.request_id, order.lease_id)
            case Progress():
                self._lease_server.progress(order)
            case Grant():
                self._lease_server.grant(order.terms)
            case Withdraw():
                self._lease_server.withdraw(order.lease_id, order.successor)
            case Revoke():
                self._revoke(order)
            case ReleaseOwn():
                self._lease_server.release_own(order.lease_id, order.request_id)
            case RenewLease():
                self._renewer.renew(order)
            case Fetch():
                self._fetcher.fetch(order)
            case Release():
                self._releaser.release(order)
            case Cancel():
                self._cancel(order)
            case EngineAddresses():
                self._shards = order.shards

    def _publish(self) -> None:
        sent = self._lease_server.take_freed()
        received, failed = self._fetcher.take()
        self._stats.count("num_kv_expired_reqs", self._lease_server.expired)
        self._stats.count("num_notifications_after_expiry", self._lease_server.late)
        counted = self._stats.take()
        with self._loop.lock:
            if counted is not None:
                self._reported.add(counted)
            self._outcome.sent |= sent
            self._outcome.received |= received
            self._outcome.computed |= self._renewer.take_computed()
            self._outcome.ended_s |= dict.fromkeys(received, self._clock())
            self._outcome.failed |= failed
            if self._outcome:
                self._has_ended.set()
        self._lease_server.expired = self._lease_server.late = 0

    def _make_consumer(self, context: ConsumerContext) -> tuple[LeaseRenewer, Releaser, Fetcher]:
        remotes, timeout_s = self._remotes, self._settings.load_timeout_s
        renewer = LeaseRenewer(context, remotes)
        releaser = Releaser(context, remotes, renewer, self._settings.ranks, timeout_s)
        fetcher = Fetcher(context, remotes, renewer, releaser, self._stats, timeout_s)
        return renewer, releaser, fetcher

    def _make_chunk_sender(
        self, gathered: Staging | None, kernels: Kernels | None
    ) -> ChunkSender | None:
        if gathered is None or kernels is None or self._settings.mode == "direct":
            return None
        slots = Slots(gathered, self._clock)
        return ChunkSender(
            self.listener,
            self._lease_server,
            self._transport,
            self._clock,
            kernels,
            self._memory,
            slots,
            self._stats,
        )

    def _body(self) -> wire.Body:
        return wire.Body(
            incarnation=self.incarnation,
            views=self._memory.views,
            regions=self._memory.regions,
            transport=self._settings.transport_name,
            hello=self._transport.hello(),
            shards=self._shards,
            direct=self._settings.mode != "staged",
            staged=self._chunk_sender is not None,
            versions=dict(self._settings.versions),
            joins=True,
            slot_bytes=self._chunk_sender.slot_bytes if self._chunk_sender else 0,
        )
