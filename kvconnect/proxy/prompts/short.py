"""Which prompts are too short for a prefill engine: fewer tokens to compute than a number.

Does not know engines or HTTP: it is told what was measured. Time is an injected clock.

The number is the operator's, or ``auto``: as many tokens as a decode engine computes in the time
that a hand-over alone takes, without prefill. For so few its other requests wait no longer than
they do for a hand-over, and the first token is there sooner by prefill's whole time.

- What a decode engine computes alone is measured where it does; not before, or not lately: it is
  taken to need as long as the slowest prefill engine.
- 0, so that all prompts are split, until `ENOUGH` of both kinds were measured. Only first bytes of
  streams are measured: other answers come when all tokens are there.
- Never more than the longest hand-over that was measured: nothing is known of longer ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from kvconnect.costs import Line

MinPrefill = int | Literal["auto"]

ENOUGH = 8
LATELY_S = 300.0
KEPT = 0.95  # of the weight of earlier measurements, at each new one: some twenty count


@dataclass
class _Times:
    """Seconds by tokens of one kind of work: of each request a part, and a part of each token."""

    line: Line = field(default_factory=lambda: Line("per_byte", kept=KEPT))
    most_tokens: int = 0
    at_s: float = float("-inf")

    def add(self, tokens: int, seconds: float, now_s: float) -> None:
        self.line.add(1, max(tokens, 1), seconds)
        self.most_tokens, self.at_s = max(self.most_tokens, tokens), now_s

    def tells(self, now_s: float) -> bool:
        return self.line.measured >= ENOUGH and now_s - self.at_s < LATELY_S


class ShortPrompts:
    """Measures what `MinPrefill` ``auto`` needs, and says what it is now."""

    def __init__(self, chosen: MinPrefill, clock: Callable[[], float]) -> None:
        """``chosen``: the operator's number; ``clock`` tells seconds, from any point on."""
        self._chosen = chosen
        self._clock = clock
        self._prefill: dict[str, _Times] = {}  # engine →
        self._handover, self._alone = _Times(), _Times()

    @property
    def wanted(self) -> bool:
        """Whether any prompt is too short."""
        return self._chosen != 0

    def prefilled(self, url: str, tokens: int, seconds: float) -> None:
        """A prefill engine computed so many tokens of a prompt."""
        self._prefill.setdefault(url, _Times()).add(tokens, seconds, self._clock())

    def keep_only(self, urls: Iterable[str]) -> None:
        """Forget what other prefill engines took."""
        for url in self._prefill.keys() - set(urls):
            del self._prefill[url]

    def began(self, tokens: int, seconds: float, handed_over: bool) -> None:
        """A decode engine had its first token; so many of the prompt's it did not hold before."""
        times = self._handover if handed_over else self._alone
        times.add(tokens, seconds, self._clock())

    def min_tokens(self) -> int:
        """A prompt with fewer tokens to compute goes to decode alone."""
        if self._chosen != "auto":
            return self._chosen
        now_s, handover = self._clock(), self._handover
        if not handover.tells(now_s) or not (compute := self._computes(now_s)):
            return 0
        return min(_crossing(line, handover.line, handover.most_tokens) for line in compute)

    def _computes(self, now_s: float) -> list[Line]:
        """How long decode takes, at most."""
        if self._alone.tells(now_s):
            return [self._alone.line]
        return [times.line for times in self._prefill.values() if times.tells(now_s)]


def _crossing(compute: Line, handover: Line, most: int) -> int:
    """The least tokens whose computing takes longer than their hand-over; ``most`` at most."""
    lead_s = handover.each - compute.each
    loses_s = compute.per_byte - handover.per_byte
    if lead_s <= 0:
        return 0
    return most if loses_s * most <= lead_s else int(lead_s / loses_s)
