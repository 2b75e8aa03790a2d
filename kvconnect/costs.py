"""Direct or staged, from what was measured of one peer: running averages, never a constant.

* The direct path costs a time per descriptor and one per byte, the staged one a time per transfer
  and one per byte. Both pairs are fitted to the latest transfers, older ones counting less, so a
  transfer whose blocks lie together may go directly where scattered ones are staged.
* A transfer too small to measure goes directly: so few descriptors cost less than asking.
* The first transfer of each path pays for what is set up once and is not counted. Then both are
  tried. Before the direct path was measured, a descriptor is taken to cost `DESCRIPTOR_S`, so that
  a transfer of a million descriptors is not the one to find out.
* The slower path is tried again when the time spent on the faster one has earned it: tries cost
  at most `TRIES_COST` of all time, however much slower that path is.
* A path that failed is left alone until the time spent since has earned what the failure cost, and
  for at least `AFTER_FAILURE` transfers, twice as many with each failure in a row. Where both fail,
  the one that failed longer ago is tried.
"""

from dataclasses import dataclass
from typing import Literal

KEPT = 0.8  # of the weight of earlier measurements, at each new one
WORTH_MEASURING_BYTES = 1 << 20  # a smaller transfer says little about rates
TRIES_COST = 0.02  # of all time, for trying the slower path
OFTEN = 4  # transfers between two tries, at least
AFTER_FAILURE = 64  # transfers that a path which failed is left alone, at least
DOUBLINGS = 6  # of that, with each failure in a row
DESCRIPTOR_S = 2e-6  # a first guess: NIXL over UCX takes 1.7 µs to submit one, docs/perf-log.md
FIRST_TRY_S = 0.1  # more than that is not spent on a first guess where a transfer can be staged
INDEPENDENT = 1e-3  # a smaller part that the two do not have in common cannot be told apart


@dataclass
class Average:
    """A running one."""

    value: float = 0.0
    measured: int = 0

    def add(self, value: float) -> float:
        """The average with one more ``value``."""
        self.measured += 1
        part = max(1 - KEPT, 1 / self.measured)
        self.value += part * (value - self.value)
        return self.value


@dataclass
class Line:
    """``seconds ≈ each * count + per_byte * nbytes``: least squares of the errors per byte.

    Of transfers that were all alike one cannot tell the two apart: then all is taken for what
    ``alike`` names, and the first transfer of another kind shows it.
    """

    alike: Literal["each", "per_byte"]
    each: float = 0.0
    per_byte: float = 0.0
    measured: int = 0
    kept: float = KEPT
    """Of the weight of earlier measurements, at each new one."""

    def __post_init__(self) -> None:
        # with c = count / nbytes and y = seconds / nbytes: of c², c, 1, c * y, y
        self._sums = [0.0] * 5

    def add(self, count: int, nbytes: int, seconds: float) -> None:
        """A transfer took ``seconds``."""
        c, y = count / nbytes, seconds / nbytes
        new = (c * c, c, 1.0, c * y, y)
        self._sums = [self.kept * old + x for old, x in zip(self._sums, new, strict=True)]
        self.measured += 1
        cc, c, one, cy, y = self._sums
        rest = cc * one - c * c
        best: Literal["each", "per_byte"] = self.alike if cc else "per_byte"
        if rest > INDEPENDENT * cc * one:
            self.each, self.per_byte = (cy * one - y * c) / rest, (y * cc - cy * c) / rest
            if min(self.each, self.per_byte) >= 0:
                return
            # noise: what the other one explains better alone
            best = "each" if cy * cy * one > y * y * cc else "per_byte"
        self.each, self.per_byte = (cy / cc, 0.0) if best == "each" else (0.0, y / one)

    def seconds(self, count: int, nbytes: int) -> float:
        """What a transfer is expected to take."""
        return self.each * count + self.per_byte * nbytes


@dataclass
class _Path:
    """What is known of one of the two paths of a peer."""

    line: Line
    seen: int = 0
    """Transfers that ended well."""
    failed_at: int = 0
    """Number of the transfer at which it failed last; 0 if it never did, or was well since."""
    failures: int = 0
    """In a row."""
    owed_s: float = 0.0
    """What its last failure cost and the other path has not earned yet."""


class Costs:
    """What the two paths of one peer cost, and which one its next transfer should take."""

    def __init__(self) -> None:
        self.direct, self.staged = Line("each"), Line("per_byte")
        self._paths = {False: _Path(self.direct), True: _Path(self.staged)}  # staged? → path
        self._transfers = 0
        self._earned_s = 0.0  # for the next try of the slower path
        self._since_try = 0

    def measured(self, staged: bool, descriptors: int, nbytes: int, seconds: float) -> None:
        """A transfer ended well; ``descriptors`` as they were expected when it was chosen."""
        path, other = self._paths[staged], self._paths[not staged]
        path.failed_at, path.failures, path.owed_s = 0, 0, 0.0
        other.owed_s = max(0.0, other.owed_s - TRIES_COST * seconds)
        if nbytes < WORTH_MEASURING_BYTES:
            return
        path.seen += 1
        if path.seen > 1:
            path.line.add(1 if staged else descriptors, nbytes, seconds)

    def failed(self, staged: bool, seconds: float) -> None:
        """A transfer failed by reason of the path it took, ``seconds`` after it had begun."""
        path = self._paths[staged]
        path.failed_at, path.owed_s = max(self._transfers, 1), max(seconds, 0.0)
        path.failures += 1

    @property
    def direct_fails(self) -> bool:
        """Whether the direct path failed so lately that it is not to be tried."""
        return self._is_failing(False)

    def choose_staged(self, descriptors: int, nbytes: int) -> bool:
        """Whether the next transfer, which could go either way, should be staged."""
        self._transfers += 1
        failing = {staged for staged in (False, True) if self._is_failing(staged)}
        if len(failing) == 2:
            return self._paths[True].failed_at < self._paths[False].failed_at
        if failing:
            return False in failing
        if nbytes < WORTH_MEASURING_BYTES:
            return False
        guessed_s = descriptors * DESCRIPTOR_S
        direct_s = self.direct.seconds(descriptors, nbytes) if self.direct.measured else guessed_s
        if not self.staged.measured:
            staged_first = direct_s > FIRST_TRY_S
            return staged_first or self._paths[True].seen < self._paths[False].seen
        if not self.direct.measured and direct_s <= FIRST_TRY_S:
            return self._paths[True].seen < self._paths[False].seen
        return self._faster_or_try(direct_s, self.staged.seconds(1, nbytes))

    def _faster_or_try(self, direct_s: float, staged_s: float) -> bool:
        """Whether to stage: the faster way, or the other one if a try of it has been earned."""
        faster = staged_s < direct_s
        least_s, most_s = sorted((direct_s, staged_s))
        self._since_try += 1
        self._earned_s += TRIES_COST * least_s
        if self._since_try < OFTEN or self._earned_s < most_s - least_s:
            return faster
        self._since_try, self._earned_s = 0, 0.0
        return not faster

    def _is_failing(self, staged: bool) -> bool:
        path = self._paths[staged]
        since = self._transfers - path.failed_at
        rests = AFTER_FAILURE * 2 ** min(path.failures - 1, DOUBLINGS)
        return bool(path.failed_at) and (since <= rests or path.owed_s > 0)
