"""The demo's table: what a scene moved and cost, whether it went right, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich import box
from rich.table import Table

MB = 1e6

CAPTION = """\
[b]Moved[/b]: what the decode engine got from prefill; GB/s: over the transfers' time.
[b]Hand-over[/b]: from when the decode engine received a request, with prefill's answer
in it, to its first token; mean. The first includes the engines' first meeting.
[b]Computed[/b]: prompt tokens that the decode engine prefilled (its counter
vllm:prompt_tokens_by_source), aside from the last one, which vLLM always runs
again to sample from it.
[b]= P, = D[/b]: answers equal to those of prefill and decode, each asked directly.
[b]†[/b]: the prefill engine was dead, and decode worked alone."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scene. Sums over its prompts."""

    name: str
    alone: bool
    """The prefill engine was dead."""
    prompts: int
    prompt_tokens: int
    """As the answers' usage says."""
    moved_tokens: int
    cached_tokens: int
    """Out of the decode engine's own prefix cache."""
    computed_tokens: int
    moved_mb: float
    gb_per_s: float | None
    hand_over_ms: float
    failed_transfers: int
    equal_to_prefill: int
    """Answers; those of the prefill engine were asked for while it lived."""
    equal_to_decode: int
    answers: list[str]

    def faults(self) -> list[str]:
        """What is not as promised; nothing if the row is right."""
        at_decode = self.moved_tokens + self.cached_tokens + self.computed_tokens
        checks = [
            (
                at_decode != self.prompt_tokens,
                f"decode counted {at_decode} prompt tokens, expected {self.prompt_tokens}",
            ),
            (
                self.equal_to_prefill < self.prompts,
                f"{self.prompts - self.equal_to_prefill} answers differ from prefill's",
            ),
            (
                self.equal_to_decode < self.prompts,
                f"{self.prompts - self.equal_to_decode} answers differ from decode's own",
            ),
        ]
        if self.alone:
            moved = self.moved_mb > 0 or self.moved_tokens > 0
            checks.append((moved, "KV was moved though the prefill engine was dead"))
        else:
            checks += [
                (self.moved_mb <= 0, "no KV was moved"),
                (
                    self.computed_tokens > 0,
                    f"{self.computed_tokens} prompt tokens were computed at decode",
                ),
                (
                    self.failed_transfers > 0,
                    f"{self.failed_transfers} transfers failed",
                ),
            ]
        return [fault for failed, fault in checks if failed]


def table(rows: Sequence[Row]) -> Table:
    """The rows as people read them, in 80 columns; CAPTION belongs under it."""
    shown = Table(title="prefill → decode", box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Request", no_wrap=True)
    for name in ("Prompt\ntokens", "Moved\ntokens", "Moved\nMB", "GB/s", "Hand-\nover ms"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("Com-\nputed", "= P", "= D", ""):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            f"{row.name} †" if row.alone else row.name,
            f"{row.prompt_tokens:,}",
            f"{row.moved_tokens:,}",
            f"{row.moved_mb:.1f}",
            "–" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
            f"{row.hand_over_ms:.0f}",
            f"{row.computed_tokens:,}",
            f"{row.equal_to_prefill}/{row.prompts}",
            f"{row.equal_to_decode}/{row.prompts}",
            "[red]✗[/red]" if row.faults() else "[green]✓[/green]",
        )
    return shown


class Judged(Protocol):
    """A row of any demo's table."""

    @property
    def name(self) -> str:
        """What was asked."""

    def faults(self) -> list[str]:
        """What is wrong with it."""


def failure(rows: Sequence[Judged], expected: int) -> str:
    """What is wrong with rows, of which there should be ``expected``, in one line; or ""."""
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults()]
    if len(rows) < expected:
        faults.append(f"{expected - len(rows)} of {expected} requests were not made")
    return "FAILED: " + "; ".join(faults) if faults else ""


def verdict(rows: Sequence[Row], expected: int) -> tuple[bool, str]:
    """Whether all ``expected`` rows are there and right, in one line."""
    if line := failure(rows, expected):
        return False, line
    together, alone = ([r for r in rows if r.alone is a] for a in (False, True))
    moved, of = (
        sum(r.moved_tokens for r in together),
        sum(r.prompt_tokens for r in together),
    )
    return True, (
        f"RIGHT: {moved:,} of {of:,} prompt tokens handed over, "
        f"{sum(r.moved_mb for r in together):.0f} MB, none computed again; all "
        f"{sum(r.prompts for r in rows)} answers equal, {sum(r.prompts for r in alone)} of them "
        "after the prefill engine was killed"
    )
