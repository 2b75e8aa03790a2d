"""The table of the demo of several connectors: which source gave what of each load, and verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from kvconnect.cli.rows import failure

CAPTION = """\
[b]Peer, Host[/b]: prompt tokens that the decode engine loaded from the prefill
engine, and from its own host memory, in one load
(vllm:kvconnect_chain_tokens_from_…); [b]Computed[/b]: prefilled there.
[b]First token[/b]: from when it received the request; [b]× faster[/b]: than where it
computed a prompt of that length. [b]=[/b]: equal to the prefill engine's own answer.
† the prefill engine was killed after it had handed out its ticket; the load
waits for it (handshake_timeout) before the rest is computed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt at the decode engine."""

    name: str
    prompt_tokens: int
    peer_tokens: int
    host_tokens: int
    computed_tokens: int
    sources: frozenset[str]
    """Which of the three above should have given something: peer, host, computed."""
    first_token_ms: float
    recompute_ms: float
    """The first token of the prompt that was computed."""
    equal: bool
    alone: bool = False
    """The prefill engine was dead."""

    @property
    def speedup(self) -> float:
        return self.recompute_ms / self.first_token_ms if self.first_token_ms else 0.0

    def faults(self) -> list[str]:
        """What is not as promised; nothing if the row is right."""
        seen = {
            "peer": self.peer_tokens,
            "host": self.host_tokens,
            "computed": self.computed_tokens,
        }
        found = [
            f"{count} tokens {'' if source == 'computed' else 'from '}{source}, expected "
            f"{'some' if source in self.sources else 'none'}"
            for source, count in seen.items()
            if (count > 0) is not (source in self.sources)
        ]
        if (whole := sum(seen.values())) != self.prompt_tokens:
            found.append(f"{whole} tokens were counted, expected {self.prompt_tokens}")
        return found if self.equal else [*found, "the answer differs from prefill's own"]


def table(rows: Sequence[Row]) -> Table:
    """The rows as people read them, in 80 columns; CAPTION belongs under it."""
    shown = Table(title="several connectors in one", box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Request", no_wrap=True)
    for name in ("Prompt\ntokens", "Peer", "Host", "Com-\nputed", "First\ntoken ms", "× fas-\nter"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("=", ""):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            f"{row.name} †" if row.alone else row.name,
            f"{row.prompt_tokens:,}",
            f"{row.peer_tokens:,}",
            f"{row.host_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.first_token_ms:.0f}",
            "–" if row.sources == {"computed"} else f"{row.speedup:.1f}",
            f"{row.equal:d}/1",
            "[red]✗[/red]" if row.faults() else "[green]✓[/green]",
        )
    return shown


def verdict(rows: Sequence[Row], expected: int) -> tuple[bool, str]:
    """Whether all ``expected`` rows are there and right, in one line."""
    if line := failure(rows, expected):
        return False, line
    peer, host = sum(r.peer_tokens for r in rows), sum(r.host_tokens for r in rows)
    both = sum(bool(r.peer_tokens and r.host_tokens) for r in rows)
    return True, (
        f"RIGHT: {peer:,} prompt tokens from the peer and {host:,} from host memory, in {both} "
        f"loads from both at once; all {len(rows)} answers equal to the prefill engine's own"
    )
