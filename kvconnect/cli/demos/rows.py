"""What the demos saw: a row of each play's table says itself what is wrong with it.

A table shows rows of one class, in 80 columns; its caption belongs under it.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from rich import box
from rich.table import Table

MB = 1e6
ARROW = 30  # cells of the longest arrow


@dataclass(frozen=True, kw_only=True)
class DemoRow(ABC):
    """One scene: prompts that were asked at once. Figures are sums over them."""

    title: ClassVar[str]
    caption: ClassVar[str]

    name: str
    prompt_tokens: int
    """As the answers' usage says."""
    computed_tokens: int

    @abstractmethod
    def cells(self) -> dict[str, str]:
        """What the table shows, by the column's header; the row's name is the first."""

    @abstractmethod
    def checks(self) -> list[tuple[bool, str]]:
        """What must not be, and the words for it."""

    @abstractmethod
    def flows(self) -> dict[tuple[str, str], int]:
        """Prompt tokens by who sent them and who got them."""

    @classmethod
    @abstractmethod
    def summary(cls, rows: Sequence[Self]) -> str:
        """One line about rows that are all right."""

    def faults(self) -> list[str]:
        """What is not as promised; nothing if the row is right."""
        return [fault for failed, fault in self.checks() if failed]


def table(rows: Sequence[DemoRow]) -> Table:
    """The rows as people read them."""
    shown = Table(title=rows[0].title, box=box.SIMPLE_HEAD, padding=0)
    for header in (*rows[0].cells(), ""):
        shown.add_column(header, justify="right" if shown.columns else "left", no_wrap=True)
    for row in rows:
        mark = "[red]✗[/red]" if row.faults() else "[green]✓[/green]"
        shown.add_row(*row.cells().values(), mark)
    return shown


def picture(rows: Sequence[DemoRow]) -> str:
    """Who sent what to whom, over all rows: an arrow each, as long as it is many tokens."""
    sums: Counter[tuple[str, str]] = Counter()
    for row in rows:
        sums.update(row.flows())
    if not (most := max(sums.values(), default=0)):
        return ""
    width = max(len(sender) for sender, _ in sums)
    return "\n".join(
        f"{sender:>{width}} {'━' * -(-tokens * ARROW // most) + '▶':{ARROW + 1}} {receiver}"
        f"  {tokens:,} tokens"
        for (sender, receiver), tokens in sums.items()
        if tokens
    )


def verdict(rows: Sequence[DemoRow], expected: int) -> tuple[bool, str]:
    """Whether all ``expected`` rows are there and right, in one line."""
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults()]
    if len(rows) < expected:
        faults.append(f"{expected - len(rows)} of {expected} requests were not made")
    if faults:
        return False, "FAILED: " + "; ".join(faults)
    return True, f"RIGHT: {rows[0].summary(rows)}"


@dataclass(frozen=True, kw_only=True)
class HandOverRow(DemoRow):
    """What a decode engine got from the prefill engine."""

    title = "prefill → decode"
    caption = """\
[b]Moved[/b]: what the decode engine got from prefill; GB/s: over the transfers' time.
[b]Hand-over[/b]: from when the decode engine received a request, with prefill's answer
in it, to its first token; mean. The first includes the engines' first meeting.
[b]Computed[/b]: prompt tokens that the decode engine prefilled (its counter
vllm:prompt_tokens_by_source), aside from the last one, which vLLM always runs
again to sample from it.
[b]= P, = D[/b]: answers equal to those of prefill and decode, each asked directly.
[b]†[/b]: the prefill engine was dead, and decode worked alone."""

    alone: bool
    """The prefill engine was dead."""
    prompts: int
    moved_tokens: int
    cached_tokens: int
    """Out of the decode engine's own prefix cache."""
    moved_mb: float
    gb_per_s: float | None
    hand_over_ms: float
    failed_transfers: int
    equal_to_prefill: int
    """Answers; those of the prefill engine were asked for while it lived."""
    equal_to_decode: int
    answers: list[str]

    def cells(self) -> dict[str, str]:
        return {
            "Request": f"{self.name} †" if self.alone else self.name,
            "Prompt\ntokens": f"{self.prompt_tokens:,}",
            "Moved\ntokens": f"{self.moved_tokens:,}",
            "Moved\nMB": f"{self.moved_mb:.1f}",
            "GB/s": "–" if self.gb_per_s is None else f"{self.gb_per_s:.2f}",
            "Hand-\nover ms": f"{self.hand_over_ms:.0f}",
            "Com-\nputed": f"{self.computed_tokens:,}",
            "= P": f"{self.equal_to_prefill}/{self.prompts}",
            "= D": f"{self.equal_to_decode}/{self.prompts}",
        }

    def flows(self) -> dict[tuple[str, str], int]:
        return {
            ("prefill", "decode"): self.moved_tokens,
            ("decode's own cache", "decode"): self.cached_tokens,
            ("decode computed", "decode"): self.computed_tokens,
        }

    def checks(self) -> list[tuple[bool, str]]:
        counted = self.moved_tokens + self.cached_tokens + self.computed_tokens
        differ = {
            "prefill's": self.prompts - self.equal_to_prefill,
            "decode's own": self.prompts - self.equal_to_decode,
        }
        checks = [
            (
                counted != self.prompt_tokens,
                f"decode counted {counted} prompt tokens, expected {self.prompt_tokens}",
            )
        ]
        checks += [(n > 0, f"{n} answers differ from {whose}") for whose, n in differ.items()]
        if self.alone:
            moved = self.moved_mb > 0 or self.moved_tokens > 0
            return [*checks, (moved, "KV was moved though the prefill engine was dead")]
        computed, failed = self.computed_tokens, self.failed_transfers
        return [
            *checks,
            (self.moved_mb <= 0, "no KV was moved"),
            (computed > 0, f"{computed} prompt tokens were computed at decode"),
            (failed > 0, f"{failed} transfers failed"),
        ]

    @classmethod
    def summary(cls, rows: Sequence[Self]) -> str:
        together = [row for row in rows if not row.alone]
        moved = sum(row.moved_tokens for row in together)
        return (
            f"{moved:,} of {sum(row.prompt_tokens for row in together):,} prompt tokens handed "
            f"over, {sum(row.moved_mb for row in together):.0f} MB, none computed again; all "
            f"{sum(row.prompts for row in rows)} answers equal, "
            f"{sum(row.prompts for row in rows if row.alone)} of them after the prefill engine "
            "was killed"
        )


@dataclass(frozen=True, kw_only=True)
class TimedRow(DemoRow):
    """Where tokens came from, and the first token beside that of prompts that were computed."""

    sources_shown: ClassVar[tuple[str, ...]]

    prompts: int = 1
    equal: int
    """Answers, to what was expected of them."""
    first_token_ms: float
    recompute_ms: float
    """The first token where the same prompts, or one of that length, were computed."""

    @property
    @abstractmethod
    def is_computed(self) -> bool:
        """Whether nothing should have been loaded."""

    @property
    def speedup(self) -> float:
        return self.recompute_ms / self.first_token_ms if self.first_token_ms else 0.0

    def flows(self) -> dict[tuple[str, str], int]:
        sent = {f"from {source}": tokens for source, tokens in self.loaded().items()}
        sent["computed"] = self.computed_tokens
        return {(sender, "engine"): tokens for sender, tokens in sent.items()}

    def loaded(self) -> dict[str, int]:
        """Tokens by the source they came from."""
        return {source: getattr(self, f"{source}_tokens") for source in self.sources_shown}

    def cells(self) -> dict[str, str]:
        return {
            "Request": self.name,
            "Prompt\ntokens": f"{self.prompt_tokens:,}",
            **{source.capitalize(): f"{tokens:,}" for source, tokens in self.loaded().items()},
            "Com-\nputed": f"{self.computed_tokens:,}",
            "First\ntoken ms": f"{self.first_token_ms:.0f}",
            "× fas-\nter": "–" if self.is_computed else f"{self.speedup:.1f}",
            "=": f"{self.equal:d}/{self.prompts}",
        }


@dataclass(frozen=True, kw_only=True)
class StoredRow(TimedRow):
    """Where the KV of an offloading engine's prompts came from."""

    title = "offloading"
    sources_shown = ("host", "disk")
    caption = """\
[b]Host, Disk[/b]: prompt tokens whose KV was loaded from there; [b]Computed[/b]: prefilled
(vllm:prompt_tokens_by_source), which is what does not fill a block, and the last token.
[b]First token[/b]: mean time from when the engine received a request; [b]× faster[/b]: than
where the same prompts were computed.
[b]=[/b]: answers equal to those of computed prompts."""

    source: str
    """Where their KV should come from: computed, host or disk."""
    storable_tokens: int
    """In whole blocks, the last token aside."""
    host_tokens: int
    disk_tokens: int

    @property
    def is_computed(self) -> bool:
        return self.source == "computed"

    def checks(self) -> list[tuple[bool, str]]:
        loaded = self.loaded()
        wanted = {source: self.storable_tokens * (source == self.source) for source in loaded}
        computed = self.prompt_tokens - sum(wanted.values())
        differ = self.prompts - self.equal
        return [
            *(
                (tokens != wanted[at], f"{tokens} tokens came from {at}, expected {wanted[at]}")
                for at, tokens in loaded.items()
            ),
            (
                self.computed_tokens != computed,
                f"{self.computed_tokens} tokens were computed, expected {computed}",
            ),
            (differ > 0, f"{differ} answers differ from computed ones"),
        ]

    @classmethod
    def summary(cls, rows: Sequence[Self]) -> str:
        return (
            f"{sum(row.host_tokens for row in rows):,} prompt tokens from host memory, "
            f"{sum(row.disk_tokens for row in rows):,} from disk after kill -9; all "
            f"{sum(row.prompts for row in rows)} answers equal to computed ones"
        )


@dataclass(frozen=True, kw_only=True)
class ChainedRow(TimedRow):
    """Which source gave what of one prompt's load at a decode engine with several connectors."""

    title = "several connectors in one"
    sources_shown = ("peer", "host")
    caption = """\
[b]Peer, Host[/b]: prompt tokens that the decode engine loaded from the prefill
engine, and from its own host memory, in one load
(vllm:kvconnect_chain_tokens_from_…); [b]Computed[/b]: prefilled there.
[b]First token[/b]: from when it received the request; [b]× faster[/b]: than where it
computed a prompt of that length. [b]=[/b]: equal to the prefill engine's own answer.
† the prefill engine was killed after it had handed out its ticket; the load
waits for it (handshake_timeout) before the rest is computed."""

    peer_tokens: int
    host_tokens: int
    sources: frozenset[str]
    """Which should have given something, and no other: peer, host, computed."""
    alone: bool = False
    """The prefill engine was dead."""

    @property
    def is_computed(self) -> bool:
        return self.sources == {"computed"}

    def cells(self) -> dict[str, str]:
        return super().cells() | ({"Request": f"{self.name} †"} if self.alone else {})

    def checks(self) -> list[tuple[bool, str]]:
        seen = {f"from {source}": tokens for source, tokens in self.loaded().items()}
        seen["computed"] = self.computed_tokens
        wanted = {label: label.removeprefix("from ") in self.sources for label in seen}
        counted = sum(seen.values())
        return [
            *(
                (
                    (count > 0) is not wanted[label],
                    f"{count} tokens {label}, expected {'some' if wanted[label] else 'none'}",
                )
                for label, count in seen.items()
            ),
            (
                counted != self.prompt_tokens,
                f"{counted} tokens were counted, expected {self.prompt_tokens}",
            ),
            (not self.equal, "the answer differs from prefill's own"),
        ]

    @classmethod
    def summary(cls, rows: Sequence[Self]) -> str:
        both = sum(bool(row.peer_tokens and row.host_tokens) for row in rows)
        return (
            f"{sum(row.peer_tokens for row in rows):,} prompt tokens from the peer and "
            f"{sum(row.host_tokens for row in rows):,} from host memory, in {both} loads from both "
            f"at once; all {len(rows)} answers equal to the prefill engine's own"
        )
