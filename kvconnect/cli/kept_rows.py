"""The offloading demo's table: where prompts' KV came from, what that took, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from kvconnect.cli.rows import failure

CAPTION = """\
[b]Host, Disk[/b]: prompt tokens whose KV was loaded from there; [b]Computed[/b]: prefilled
(vllm:prompt_tokens_by_source), which is what does not fill a block, and the last token.
[b]First token[/b]: mean time from when the engine received a request; [b]× faster[/b]: than
where the same prompts were computed.
[b]=[/b]: answers equal to those of computed prompts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Prompts that were asked at once. Sums over them."""

    name: str
    source: str
    """Where their KV should come from: computed, host or disk."""
    prompts: int
    prompt_tokens: int
    storable_tokens: int
    """In whole blocks, the last token aside."""
    host_tokens: int
    disk_tokens: int
    computed_tokens: int
    first_token_ms: float
    recompute_ms: float
    """The first token where the prompts were computed."""
    equal: int
    """Answers."""

    @property
    def speedup(self) -> float:
        return self.recompute_ms / self.first_token_ms if self.first_token_ms else 0.0

    def faults(self) -> list[str]:
        """What is not as promised; nothing if the row is right."""
        loaded = {"host": self.host_tokens, "disk": self.disk_tokens}
        found = []
        for source, tokens in loaded.items():
            expected = self.storable_tokens if source == self.source else 0
            if tokens != expected:
                found.append(f"{tokens} tokens came from {source}, expected {expected}")
        expected = self.prompt_tokens - (0 if self.source == "computed" else self.storable_tokens)
        if self.computed_tokens != expected:
            found.append(f"{self.computed_tokens} tokens were computed, expected {expected}")
        if self.equal < self.prompts:
            found.append(f"{self.prompts - self.equal} answers differ from computed ones")
        return found


def table(rows: Sequence[Row]) -> Table:
    """The rows as people read them, in 80 columns; CAPTION belongs under it."""
    shown = Table(title="offloading", box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("Request", no_wrap=True)
    for name in ("Prompt\ntokens", "Host", "Disk", "Com-\nputed", "First\ntoken ms", "× fas-\nter"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("=", ""):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.name,
            f"{row.prompt_tokens:,}",
            f"{row.host_tokens:,}",
            f"{row.disk_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.first_token_ms:.0f}",
            "–" if row.source == "computed" else f"{row.speedup:.1f}",
            f"{row.equal}/{row.prompts}",
            "[red]✗[/red]" if row.faults() else "[green]✓[/green]",
        )
    return shown


def verdict(rows: Sequence[Row], expected: int) -> tuple[bool, str]:
    """Whether all ``expected`` rows are there and right, in one line."""
    if line := failure(rows, expected):
        return False, line
    host, disk = sum(r.host_tokens for r in rows), sum(r.disk_tokens for r in rows)
    return True, (
        f"RIGHT: {host:,} prompt tokens from host memory, {disk:,} from disk after kill -9; all "
        f"{sum(r.prompts for r in rows)} answers equal to computed ones"
    )
