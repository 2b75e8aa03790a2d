"""One rank's thread: jobs in, KV moved, answers out.

The engine's thread calls `put`, `take` and `close`; the runner's thread alone owns the hand and
what is under it. The thread's body is `step`, which tests call without a thread.

* Saves wait behind everything else: a request waits for a fill, nobody for a save. Forgets keep
  their place before whatever takes their room.
* What is ready is carried out together, up to `TOGETHER_BYTES`: more than that has no use for a
  device, and would let a fill wait long behind saves on a CPU.
* Looks around for other engines' KV once a second.
* A programming fault in the thread is raised in the engine's thread by the next `take`.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.jobs import Answer, Fill, Forget, Job, Loss, Save
from kvconnect.offload.store.hand import Hand

logger = logging.getLogger(f"vllm.{__name__}")

THREAD_NAME = "kvconnect-offload"
LOOK_AROUND_S = 1.0
BUSY_PAUSE_S = 200e-6
TOGETHER_BYTES = 16 << 20
BYTES = {"load": "load_bytes", "store": "store_bytes"}  # what is counted, by what was done
MICROSECONDS = {"load": "load_us", "store": "store_us"}

Fence = Callable[[], bool]
"""True once the device has finished what was submitted before the jobs were given."""
Clock = Callable[[], float]


@dataclass
class Report:
    """What happened since the last one."""

    answers: list[Answer] = field(default_factory=list)
    ended_s: dict[int, float] = field(default_factory=dict)
    """When each was answered, by the runner's clock."""
    lost: list[Loss] = field(default_factory=list)
    gained: set[bytes] = field(default_factory=set)
    """Keys that other engines hold now and did not; ``gone``: the reverse."""
    gone: set[bytes] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)


class _Started(NamedTuple):
    verb: str
    nbytes: int
    at_s: float


class Runner:
    """See the module's contract. ``block_bytes``: of a block of each group."""

    def __init__(
        self,
        hand: Hand,
        block_bytes: Sequence[int] = (),
        counts: Callable[[], Counter[str]] = Counter,
        clock: Clock = time.monotonic,
        stores: bool = True,
        pause: Callable[[], None] = lambda: time.sleep(BUSY_PAUSE_S),
    ) -> None:
        """``counts``: what the vault has counted since it was made; ``stores``: whether saves are
        carried out here; ``pause``: what `rest` does between two looks."""
        self._hand = hand
        self._block_bytes = block_bytes
        self._counts = counts
        self._counted: Counter[str] = Counter()
        self._clock = clock
        self._stores = stores
        self._pause = pause
        self._looked_at = clock() - LOOK_AROUND_S
        self._started: dict[int, _Started] = {}
        self._wake = threading.Event()
        self._lock = threading.Lock()  # guards the five below
        self._urgent: deque[tuple[Job, Fence | None]] = deque()
        self._saves: deque[tuple[Job, Fence | None]] = deque()
        self._report = Report()
        self._fault: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._open = 0  # jobs that are to be answered; guarded too

    # -- the engine's thread ----------------------------------------------------------

    def start(self) -> None:
        """Run `step` on a thread until `close`."""
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def put(self, jobs: Sequence[Job], fence: Fence | None = None) -> None:
        """Give jobs, which are carried out once ``fence`` says so."""
        if not jobs:
            return
        with self._lock:
            for job in jobs:
                (self._saves if isinstance(job, Save) else self._urgent).append((job, fence))
                self._open += not isinstance(job, Forget)
        self._wake.set()

    def take(self) -> Report:
        """What happened since the last call; raises what stopped the thread, if anything did."""
        with self._lock:
            if self._fault is not None:
                raise self._fault
            taken, self._report = self._report, Report()
        return taken

    def rest(self, within_s: float = 10.0) -> bool:
        """Wait until every job has been carried out; False if some has not by then."""
        until_s = self._clock() + within_s
        while True:
            with self._lock:
                if not self._open or self._fault is not None:
                    return not self._open
            if self._clock() >= until_s:
                return False
            self._pause()

    def close(self) -> bool:
        """Stop the thread; False if it would not. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            if self._thread.is_alive():
                logger.error("the offloading thread did not stop in 10 s")
                return False
        return True

    # -- the runner's thread ----------------------------------------------------------

    def step(self) -> bool:
        """Start some jobs, and see what ended; says whether there were any."""
        jobs = self._next()
        self._hand.put(jobs)
        answers, lost = self._hand.take()
        gained: set[bytes] = set()
        gone: set[bytes] = set()
        if self._clock() - self._looked_at >= LOOK_AROUND_S:
            self._looked_at = self._clock()
            gained, gone = self._hand.look_around()
        self._publish(answers, lost, gained, gone)
        return bool(jobs or answers)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if self.step():
                    continue
                with self._lock:
                    waiting = bool(self._urgent or self._saves)
                self._wake.wait(BUSY_PAUSE_S if waiting or self._hand.busy else LOOK_AROUND_S)
        except BaseException as e:
            with self._lock:
                self._fault = e

    def _next(self) -> list[Job]:
        """The first ones of a queue, as many as are to go together."""
        jobs: list[Job] = []
        nbytes, now_s = 0, self._clock()
        with self._lock:
            for queue in (self._urgent, self._saves):
                while queue and nbytes < TOGETHER_BYTES:
                    job, fence = queue[0]
                    if fence is not None and not fence():
                        break
                    queue.popleft()
                    nbytes += self._note(job, now_s)
                    jobs.append(job)
                if jobs:
                    break
        return jobs

    def _note(self, job: Job, now_s: float) -> int:
        """Remember what is started; how many bytes it moves."""
        if isinstance(job, Forget):
            return 0
        verb, blocks = "", 0
        if isinstance(job, Fill) or (isinstance(job, Save) and self._stores):
            verb = "store" if isinstance(job, Save) else "load"
            blocks = sum(block != NO_BLOCK for block in job.blocks)
        each = self._block_bytes[job.group] if blocks and self._block_bytes else 0  # type: ignore[union-attr]
        self._started[job.number] = _Started(verb, blocks * each, now_s)
        return blocks * each

    def _publish(
        self, answers: list[Answer], lost: list[Loss], gained: set[bytes], gone: set[bytes]
    ) -> None:
        counts: Counter[str] = Counter()
        moved: set[tuple[str, float]] = set()
        for answer in answers:
            verb, nbytes, at_s = self._started.pop(answer.number)
            if verb and not answer.error:
                counts[BYTES[verb]] += nbytes
                moved.add((verb, at_s))
        for verb, at_s in moved:  # once for what went together
            counts[MICROSECONDS[verb]] += round(1e6 * (self._clock() - at_s))
        now = self._counts()
        counts += now - self._counted
        self._counted = now
        with self._lock:
            report = self._report
            report.answers += answers
            self._open -= len(answers)
            report.ended_s |= dict.fromkeys((one.number for one in answers), self._clock())
            report.lost += lost
            report.counts += counts
            came, went = report.gained, report.gone  # what came and went meanwhile, did neither
            report.gained = (came - gone) | (gained - went)
            report.gone = (went - gained) | (gone - came)
