"""Direct or staged, from what was measured: running averages per peer, never a constant.

Rows of one peer are always of the same sizes, so seconds per byte compare the two paths as they
are: posting descriptors, gathering, wire and scattering included.
"""

import itertools

WEIGHT = 0.2  # of the newest measurement
WORTH_TRYING_BYTES = 1 << 20  # a smaller transfer says little about rates
TRY_AGAIN = 64  # transfers between two tries of the slower path


class Costs:
    """Of one peer."""

    def __init__(self) -> None:
        self._seconds_per_byte: dict[bool, float] = {}  # staged? → average
        self._transfers = itertools.count(1)

    def measured(self, staged: bool, nbytes: int, seconds: float) -> None:
        """A transfer ended well."""
        if nbytes < WORTH_TRYING_BYTES:
            return
        now = seconds / nbytes
        old = self._seconds_per_byte.get(staged, now)
        self._seconds_per_byte[staged] = old + WEIGHT * (now - old)

    def choose_staged(self, nbytes: int) -> bool:
        """Whether the next transfer, which could go either way, should be staged."""
        if nbytes < WORTH_TRYING_BYTES:
            return self._faster_staged
        for path in (False, True):
            if path not in self._seconds_per_byte:
                return path
        if next(self._transfers) % TRY_AGAIN == 0:
            return not self._faster_staged
        return self._faster_staged

    @property
    def _faster_staged(self) -> bool:
        direct, staged = (self._seconds_per_byte.get(path) for path in (False, True))
        return direct is not None and staged is not None and staged < direct
