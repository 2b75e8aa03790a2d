"""What of a source's blocks is taken now, where they are taken as they are computed.

A plan is made once for a peer; a stretch cuts a request's share of it by the places in the source's
block tables, whatever size its blocks have. All stretches of a request together are the whole.
"""

from math import inf
from typing import NamedTuple


class Stretch(NamedTuple):
    """Of the source's block tables, per group: blocks ``[since, until)``; the default: all of them.

    What is cut so crosses in several transfers, each with what the source has computed meanwhile.
    """

    since: tuple[int, ...] = ()
    """() stands for the beginning of every group."""
    until: tuple[int, ...] | None = None
    """None: all that is left."""

    def of(self, group: int) -> tuple[int, float]:
        """From which block of a group on, and up to which."""
        since = self.since[group] if group < len(self.since) else 0
        if self.until is None:
            return since, inf
        return since, self.until[group] if group < len(self.until) else 0


ALL = Stretch()
