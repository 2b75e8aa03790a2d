"""What one staged reader wants of us: its pieces, checked, and where it has them written.

Everything here comes from a peer: what is not held, leased or does not fit is a GeometryError.
"""

from dataclasses import dataclass, field

from kvconnect.control import wire
from kvconnect.costs import Average
from kvconnect.errors import GeometryError
from kvconnect.geometry.chunks import Held
from kvconnect.geometry.rows import RowTable
from kvconnect.ops import Copy, Kernels, Prepared, chunk_bytes
from kvconnect.staging import GRANULE_BYTES


@dataclass
class PreparedSlices:
    """Pieces that cross together, checked once."""

    copies: list[Copy]
    group: int
    whole: bool
    prepared: Prepared
    sized: tuple[int, int] = (0, 0)  # tokens of the last chunk, and its bytes


@dataclass
class Reader:
    """``name`` is the transport's of it, ``table`` its arena; ``held`` are its pieces."""

    name: str
    arena: wire.Granules
    table: RowTable
    held: list[Held]
    bundles: dict[tuple[int, int], PreparedSlices] = field(default_factory=dict)
    gathered: Average = field(default_factory=Average)  # seconds per byte
    written: Average = field(default_factory=Average)

    def bundle(self, want: wire.Want, kernels: Kernels) -> PreparedSlices:
        """The pieces that a chunk is of; raises GeometryError."""
        key = first, count = want.first, want.count
        if key not in self.bundles:
            end = first + count
            if end > len(self.held):
                raise GeometryError(f"pieces up to {end} are wanted, {len(self.held)} are staged")
            chosen = self.held[first:end]
            kinds = {(held.group, held.whole, held.copy.block_tokens) for held in chosen}
            if len(kinds) > 1:
                raise GeometryError(
                    f"pieces {first}..{end} are not all of one group and block size"
                )
            if len(self.bundles) >= wire.MAX_PIECES:  # no honest reader has as many
                self.bundles.clear()
            copies = [held.copy for held in chosen]
            made = PreparedSlices(copies, chosen[0].group, chosen[0].whole, kernels.prepare(copies))
            self.bundles[key] = made
        if self.bundles[key].group != want.group:
            raise GeometryError(f"pieces {first}..{first + count} are not of group {want.group}")
        return self.bundles[key]


def check(
    want: wire.Want, bundle: PreparedSlices, leased_tokens: int, arena: wire.Granules
) -> None:
    """Raise GeometryError for a chunk that is not what was leased, or does not fit its room."""
    end = max(start + count for start, count in want.runs)
    if end > leased_tokens or min(count for _, count in want.runs) < 1:
        raise GeometryError(f"runs up to token {end} are wanted, {leased_tokens} are leased")
    tokens = sum(count for _, count in want.runs)
    if bundle.sized[0] != tokens:
        bundle.sized = tokens, chunk_bytes(bundle.copies, tokens)
    nbytes = bundle.sized[1]
    if nbytes != want.nbytes:
        raise GeometryError(f"a chunk of {want.nbytes} bytes is wanted, its runs have {nbytes}")
    end = want.granule + -(-nbytes // GRANULE_BYTES)
    if end > arena.count:
        raise GeometryError(f"granules up to {end} are offered, the arena has {arena.count}")
