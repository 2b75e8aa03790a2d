"""One rank's offloading thread: jobs in, KV moved, answers out.

The engine's thread calls `put`, `take`, `rest` and `close`; the runner's thread alone owns the
store and what is under it. The thread's body is `step`, which tests call without a thread.

* Each numbered job is answered once, with an error where it could not be started or did not end
  well. A key that a job was about and that is not there is reported as lost.
* Saves wait until everything else has been started: a request waits for a fill, nobody for a
  save. A forget keeps its place before whatever takes its room.
* What is ready is carried out together, up to `TOGETHER_BYTES`: more than that has no use for a
  device, and would let a fill wait long for saves on a CPU.
* Looks for other engines' KV once a second.
* An unexpected exception of one job ends that job: it is counted, logged with its traceback, and
  answered. A broken invariant (AssertionError) ends the thread, and is raised by `take`.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.loop import Fence, Loop
from kvconnect.offload.jobs import Fill, Forget, Job, JobDone, Loss, Save, Spill

logger = logging.getLogger(f"vllm.{__name__}")

THREAD_NAME = "kvconnect-offload"
LOOK_AROUND_S = 1.0
BUSY_PAUSE_S = 200e-6
TOGETHER_BYTES = 16 << 20
VERBS: dict[type, str] = {Save: "store", Fill: "load"}  # of jobs that move bytes of the device

Clock = Callable[[], float]


class RankStore(Protocol):
    """What a runner needs of one rank's stored KV.

    `TieredStore` stores and loads, `ReplicaReader` loads what another rank stores; a fake of the
    tests is held to the same contract.
    """

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""

    def save(self, job: int, key: bytes, group: int, blocks: Sequence[int]) -> bool:
        """Start to copy blocks into memory; False: skipped."""

    def load(self, job: int, key: bytes, group: int, blocks: Sequence[int]) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK; False: a miss."""

    def spill(self, job: int, key: bytes) -> bool:
        """Start to write what memory holds to disk; False: dropped, or not needed."""

    def forget(self, key: bytes) -> None:
        """Memory holds it no more."""

    def forget_on_disk(self, key: bytes) -> None:
        """The disk holds it no more."""

    def holds(self, key: bytes, on_disk: bool) -> bool:
        """Whether the disk, or memory, holds a key."""

    def keys(self, on_disk: bool) -> list[bytes]:
        """What the disk, or memory, holds, oldest first."""

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        """What other engines hold: keys that came, and keys that went, since the last call."""

    def poll(self) -> list[JobDone]:
        """Jobs that ended since the last call, each once."""

    def take_lost(self) -> list[Loss]:
        """What turned out to be damaged since the last call, and is gone."""


@dataclass
class Report:
    """What happened since the last one."""

    done: list[JobDone] = field(default_factory=list)
    ended_s: dict[int, float] = field(default_factory=dict)
    """When each of them ended, by the runner's clock."""
    lost: list[Loss] = field(default_factory=list)
    gained: set[bytes] = field(default_factory=set)
    """Keys that other engines hold now and did not; ``gone``: those that they hold no more."""
    gone: set[bytes] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)


class _Started(NamedTuple):
    """A job that runs: what its bytes count as, and when it was started."""

    verb: str
    at_s: float


class Runner:
    """See the module's contract."""

    def __init__(
        self,
        store: RankStore,
        block_bytes: Sequence[int] = (),
        counts: Callable[[], Counter[str]] = Counter,
        clock: Clock = time.monotonic,
        pause: Callable[[], None] = lambda: time.sleep(BUSY_PAUSE_S),
    ) -> None:
        """``block_bytes``: of a block of each group, to see how much goes together.

        ``counts``: what the store has counted since it was made. ``pause``: what `rest` does
        between two looks.
        """
        self._store = store
        self._block_bytes = block_bytes
        self._counts = counts
        self._counted: Counter[str] = Counter()  # of those, what has been reported
        self._own_counts: Counter[str] = Counter()
        self._clock = clock
        self._pause = pause
        self._looked_at = clock() - LOOK_AROUND_S
        self._started: dict[int, _Started] = {}
        self._done: list[JobDone] = []
        self._lost: list[Loss] = []
        self._wake = threading.Event()
        self._loop = Loop(THREAD_NAME, self._turn, self._wake.set)
        # guarded by the loop's lock:
        self._urgent: deque[tuple[Job, Fence | None]] = deque()
        self._saves: deque[tuple[Job, Fence | None]] = deque()
        self._report = Report()
        self._open = 0  # jobs that are to be answered

    # -- the engine's thread ----------------------------------------------------------

    def start(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Run `step` on a thread until `close`; ``on_start`` is the first thing that it does."""
        self._loop.start(on_start)

    def put(self, jobs: Sequence[Job], fence: Fence | None = None) -> None:
        """Give jobs, which are carried out once ``fence`` says so."""
        with self._loop.lock:
            for job in jobs:
                (self._saves if isinstance(job, Save) else self._urgent).append((job, fence))
                self._open += not isinstance(job, Forget)
        self._wake.set()

    def take(self) -> Report:
        """What happened since the last call; raises what stopped the thread, if anything did."""
        self._loop.check()
        with self._loop.lock:
            taken, self._report = self._report, Report()
        return taken

    def rest(self, within_s: float = 10.0) -> bool:
        """Wait until every job has been carried out; False if some has not by then."""
        until_s = self._clock() + within_s
        while True:
            with self._loop.lock:
                if not self._open or self._loop.failed:
                    return not self._open
            if self._clock() >= until_s:
                return False
            self._pause()

    def close(self) -> bool:
        """Stop the thread; False if it would not. Idempotent."""
        return self._loop.close()

    # -- the runner's thread ----------------------------------------------------------

    def step(self) -> bool:
        """Start some jobs, and see what ended; says whether there were any."""
        jobs, now_s = self._next(), self._clock()
        for job in jobs:
            self._start(job, now_s)
        done, self._done = self._done + self._store.poll(), []
        lost, self._lost = self._lost + self._store.take_lost(), []
        gained: set[bytes] = set()
        gone: set[bytes] = set()
        if self._clock() - self._looked_at >= LOOK_AROUND_S:
            self._looked_at = self._clock()
            gained, gone = self._store.look_around()
        self._publish(done, lost, gained, gone)
        return bool(jobs or done)

    def _turn(self) -> None:
        self._wake.clear()
        if self.step():
            return
        with self._loop.lock:
            waiting = bool(self._urgent or self._saves)
        self._wake.wait(BUSY_PAUSE_S if waiting or self._store.busy else LOOK_AROUND_S)

    def _next(self) -> list[Job]:
        """The first ones of a queue, as many as are to go together."""
        jobs: list[Job] = []
        nbytes = 0
        with self._loop.lock:
            for queue in (self._urgent, self._saves):
                while queue and nbytes < TOGETHER_BYTES:
                    job, fence = queue[0]
                    if fence is not None and not fence():
                        break
                    queue.popleft()
                    nbytes += self._nbytes(job)
                    jobs.append(job)
                if jobs:
                    break
        return jobs

    def _nbytes(self, job: Job) -> int:
        """How many bytes a job moves to or from the device."""
        if not self._block_bytes or not isinstance(job, Save | Fill):
            return 0
        return self._block_bytes[job.group] * sum(block != NO_BLOCK for block in job.blocks)

    def _start(self, job: Job, now_s: float) -> None:
        """Start a job; what cannot be started is answered at once."""
        if not isinstance(job, Forget):
            self._started[job.number] = _Started(VERBS.get(type(job), ""), now_s)
        try:
            problem = self._begun(job)
        except OSError as e:
            problem = f"{e}"
        except AssertionError:
            raise
        except Exception as e:
            logger.exception("kvconnect: a job of offloading failed: %.200r", job)
            self._own_counts["job_faults"] += 1
            problem = f"{type(e).__name__}: {e}"
        if problem is not None and not isinstance(job, Forget):
            self._done.append(JobDone(job.number, problem))

    def _begun(self, job: Job) -> str | None:
        """Start a job; returns why it ended at once ("": well), None if it runs."""
        store = self._store
        match job:
            case Save():
                if store.save(job.number, job.key, job.group, job.blocks):
                    return None
                return "no slot in memory is free"
            case Fill():
                if store.load(job.number, job.key, job.group, job.blocks):
                    return None
                held = [on_disk for on_disk in (False, True) if store.holds(job.key, on_disk)]
                self._lost += [Loss(job.key, one) for one in (False, True) if one not in held]
                return "it is not where it was kept" if len(held) < 2 else "it cannot be read"
            case Spill():
                if store.holds(job.key, on_disk=True):
                    return ""
                if store.spill(job.number, job.key):
                    return None
                if store.holds(job.key, on_disk=False):
                    return "the disk did not take it"
                self._lost.append(Loss(job.key, False))
                return "memory does not hold it any more"
            case Forget():
                (store.forget_on_disk if job.on_disk else store.forget)(job.key)
                return None

    def _publish(
        self, done: list[JobDone], lost: list[Loss], gained: set[bytes], gone: set[bytes]
    ) -> None:
        counts = self._moved(done)
        now = self._counts() + self._own_counts
        counts += now - self._counted
        self._counted = now
        with self._loop.lock:
            report = self._report
            report.done += done
            self._open -= len(done)
            report.ended_s |= dict.fromkeys((one.id for one in done), self._clock())
            report.lost += lost
            report.counts += counts
            came, went = report.gained, report.gone  # what came and went meanwhile, did neither
            report.gained = (came - gone) | (gained - went)
            report.gone = (went - gained) | (gone - came)

    def _moved(self, done: list[JobDone]) -> Counter[str]:
        """Bytes to and from the device, and for how long; once for what went together."""
        counts: Counter[str] = Counter()
        together: set[_Started] = set()
        for one in done:
            started = self._started.pop(one.id)
            if started.verb and one.nbytes and not one.error:
                counts["store_bytes" if started.verb == "store" else "load_bytes"] += one.nbytes
                together.add(started)
        for started in together:
            spent_us = round(1e6 * (self._clock() - started.at_s))
            counts["store_us" if started.verb == "store" else "load_us"] += spent_us
        return counts
