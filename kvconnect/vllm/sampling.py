"""A digest of large files by a bounded part of their content.

* Independent of where the files are, when they were written, and what their folder is called.
* Of a safetensors file: its header (every tensor's name, type, shape and place) and pages of every
  tensor: the first, one in the middle, the last. Training, merging and quantizing change nearly
  all tensors nearly everywhere.
* With more than `MOST_PAGES` / 3 tensors (experts) one page of each; with more than `MOST_PAGES`
  one page of some, chosen by their names: a change to a few tensors alone may then be missed.
* Of any other file, and of a header that is none: its beginning, its end (where PyTorch's archives
  keep a checksum of every tensor), and pages spread evenly; small ones whole.
* Names count, as told: the order of files is part of what they are.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
MOST_PAGES = 32_768
"""How many pages of all tensors together are read: 128 MiB."""
MOST_HEADER = 100_000_000
"""Bytes; what the safetensors library reads at most."""
BEGINNING, END = 64 << 10, 1 << 20
"""Bytes that are read at the two ends of a file without a header."""
WHOLE = 4 << 20
SPREAD_PAGES = 4096
"""How many more pages are read of all files without a header together."""


class ByteSpan(NamedTuple):
    """Bytes of a file to be read."""

    start: int
    nbytes: int


class Sampled(NamedTuple):
    """What files are, and what it cost to say."""

    digest: str
    read_bytes: int


class _File(NamedTuple):
    name: str
    path: Path
    nbytes: int
    header: ByteSpan
    """With its length in front; empty where there is none."""
    tensors: list[tuple[str, ByteSpan]]


def sampled(files: Sequence[tuple[str, Path]]) -> Sampled:
    """The digest of files, each with the name that it goes by; raises OSError."""
    found = [_looked_at(name, path) for name, path in files]
    tensors = sum(len(file.tensors) for file in found)
    blank = sum(not file.header.nbytes for file in found)
    digest, read_bytes = hashlib.blake2b(digest_size=16), 0
    for file in found:
        digest.update(f"{len(file.name)} {file.name} {file.nbytes} ".encode())
        with file.path.open("rb", buffering=0) as raw:
            for span in _spans(file, tensors, blank):
                data = os.pread(raw.fileno(), span.nbytes, span.start)
                digest.update(f"{span.start} {len(data)} ".encode())
                digest.update(data)
                read_bytes += len(data)
    return Sampled(digest.hexdigest(), read_bytes)


def _looked_at(name: str, path: Path) -> _File:
    with path.open("rb", buffering=0) as raw:
        nbytes = os.fstat(raw.fileno()).st_size
        if path.suffix == ".safetensors":
            length = int.from_bytes(os.pread(raw.fileno(), 8, 0), "little")
            if 0 < length <= min(MOST_HEADER, nbytes - 8):
                tensors = _tensors(os.pread(raw.fileno(), length, 8), 8 + length)
                if tensors is not None:
                    return _File(name, path, nbytes, ByteSpan(0, 8 + length), tensors)
    return _File(name, path, nbytes, ByteSpan(0, 0), [])


def _tensors(header: bytes, start: int) -> list[tuple[str, ByteSpan]] | None:
    """Where each tensor's bytes are; None if that is no header."""
    try:
        named = json.loads(header)
        found = []
        for name, told in named.items():
            if name != "__metadata__":
                first, end = told["data_offsets"]
                found.append((name, ByteSpan(start + int(first), int(end) - int(first))))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return sorted(found, key=lambda one: one[1]) if all(s.nbytes >= 0 for _, s in found) else None


def _spans(file: _File, tensors: int, blank: int) -> Iterator[ByteSpan]:
    """What is read of a file, of ``tensors`` and of ``blank`` files without a header in all."""
    if not file.header.nbytes:
        yield from _spread(file.nbytes, max(SPREAD_PAGES // blank, 16))
        return
    yield file.header
    every = -(-tensors // MOST_PAGES)
    for name, span in file.tensors:
        if every > 1 and zlib.crc32(name.encode()) % every:
            continue
        middle = ByteSpan(span.start + max(span.nbytes - PAGE, 0) // 2, min(span.nbytes, PAGE))
        if 3 * tensors > MOST_PAGES:
            yield middle
        elif span.nbytes <= 3 * PAGE:
            yield span
        else:
            yield ByteSpan(span.start, PAGE)
            yield middle
            yield ByteSpan(span.start + span.nbytes - PAGE, PAGE)


def _spread(nbytes: int, pages: int) -> Iterator[ByteSpan]:
    if nbytes <= WHOLE:
        yield ByteSpan(0, nbytes)
        return
    yield ByteSpan(0, BEGINNING)
    between = nbytes - BEGINNING - END
    for page in range(pages):
        yield ByteSpan(BEGINNING + between * page // pages, PAGE)
    yield ByteSpan(nbytes - END, END)
