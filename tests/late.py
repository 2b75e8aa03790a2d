"""Kernels that take their time: bytes move when a launch has been asked often enough.

A decorator over real kernels, as a device that works on its own: until a launch says that it is
done, it may read and write at any moment. Whoever reuses its memory earlier gets caught.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvconnect.errors import TransportError
from kvconnect.ops import Copy, Kernels, Launch, Prepared, Verb, Wires


class LateLaunch:
    """Moves its bytes at the ``asked``-th call of `done`; ``fails`` instead if told so."""

    def __init__(self, move: Callable[[], Launch], asked: int, fails: bool) -> None:
        self._move = move
        self._left = asked
        self._fails = fails
        self._launch: Launch | None = None

    def done(self) -> bool:
        self._left -= 1
        if self._left > 0:
            return False
        if self._fails:
            raise TransportError("planned fault: the device failed")
        if self._launch is None:
            self._launch = self._move()
        return self._launch.done()

    @property
    def sums(self) -> np.ndarray:
        assert self._launch is not None, "sums are valid once done"
        return self._launch.sums


class LatePrepared:
    """See `kvconnect.ops.Prepared`."""

    def __init__(self, kernels: "LateKernels", prepared: Prepared) -> None:
        self._kernels = kernels
        self._prepared = prepared

    def move(
        self, verb: Verb, segments: np.ndarray, wires: Wires, wire_bytes: int, units: int
    ) -> LateLaunch:
        return LateLaunch(
            lambda: self._prepared.move(verb, segments, wires, wire_bytes, units),
            self._kernels.asked,
            self._kernels.fails,
        )


class LateKernels:
    """``asked`` and ``fails``: of launches from now on."""

    def __init__(self, kernels: Kernels) -> None:
        self.name = f"late {kernels.name}"
        self.fast = kernels.fast
        self.asked = 1
        self.fails = False
        self._kernels = kernels

    def prepare(self, copies: Sequence[Copy]) -> LatePrepared:
        """Check ``copies`` and make them ready."""
        return LatePrepared(self, self._kernels.prepare(copies))
