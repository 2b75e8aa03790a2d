"""Direct or staged, from what was measured of one peer: running averages, never a constant.

* The direct path costs a time per descriptor and one per byte, the staged one a time per transfer
  and one per byte. Both pairs are fitted to the latest transfers, older ones counting less, so a
  transfer whose blocks lie together may go directly where scattered ones are staged.
* A transfer too small to measure goes directly: so few descriptors cost less than asking.
* The first transfer of each path pays for what is set up once and is not counted. Then both are
  tried; the slower one again from time to time, so often that it costs about `TRIES_COST`.
"""

from dataclasses import dataclass
from typing import Literal

KEPT = 0.8  # of the weight of earlier measurements, at each new one
WORTH_MEASURING_BYTES = 1 << 20  # a smaller transfer says little about rates
TRIES_COST = 0.02  # of all time, for trying the slower path
RARELY, OFTEN = 64, 4  # transfers between two tries, at most and at least
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

    def __post_init__(self) -> None:
        # with c = count / nbytes and y = seconds / nbytes: of c², c, 1, c * y, y
        self._sums = [0.0] * 5

    def add(self, count: int, nbytes: int, seconds: float) -> None:
        """A transfer took ``seconds``."""
        c, y = count / nbytes, seconds / nbytes
        new = (c * c, c, 1.0, c * y, y)
        self._sums = [KEPT * old + x for old, x in zip(self._sums, new, strict=True)]
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


class Costs:
    """Of one peer."""

    def __init__(self) -> None:
        self.direct, self.staged = Line("each"), Line("per_byte")
        self._seen = {False: 0, True: 0}  # staged? → transfers that ended well
        self._since_try = 0

    def measured(self, staged: bool, descriptors: int, nbytes: int, seconds: float) -> None:
        """A transfer ended well; ``descriptors`` as they were expected when it was chosen."""
        if nbytes < WORTH_MEASURING_BYTES:
            return
        self._seen[staged] += 1
        if self._seen[staged] == 1:
            return
        if staged:
            self.staged.add(1, nbytes, seconds)
        else:
            self.direct.add(descriptors, nbytes, seconds)

    def choose_staged(self, descriptors: int, nbytes: int) -> bool:
        """Whether the next transfer, which could go either way, should be staged."""
        if nbytes < WORTH_MEASURING_BYTES:
            return False
        if not (self.direct.measured and self.staged.measured):
            return self._seen[True] < self._seen[False]
        direct, staged = self.direct.seconds(descriptors, nbytes), self.staged.seconds(1, nbytes)
        faster = staged < direct
        self._since_try += 1
        slower = max(direct, staged) / max(min(direct, staged), 1e-9) - 1
        if self._since_try >= min(max(slower / TRIES_COST, OFTEN), RARELY):
            self._since_try = 0
            return not faster
        return faster
