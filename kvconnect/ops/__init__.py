"""Strided KV cache ↔ dense wire, in one pass: slice, re-layout, convert, checksum.

`load` gives the `Kernels` of this machine; `Kernels.prepare` turns `Copy` descriptions into a
`Prepared`, whose `move` gathers (cache → wire) or scatters (wire → cache) any segments of blocks.
`docs/kernels.md` has the formats and figures.
"""

from kvconnect.ops.copies import (
    WIRE_ALIGN,
    Copy,
    Kernels,
    Launch,
    Prepared,
    Verb,
    Wires,
    chunk_bytes,
    wire_offsets,
)
from kvconnect.ops.dtypes import NUMBERS, Type
from kvconnect.ops.native import load

__all__ = [
    "NUMBERS",
    "WIRE_ALIGN",
    "Copy",
    "Kernels",
    "Launch",
    "Prepared",
    "Type",
    "Verb",
    "Wires",
    "chunk_bytes",
    "load",
    "wire_offsets",
]
