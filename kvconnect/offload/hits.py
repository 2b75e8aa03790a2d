"""How far stored KV reaches into a request whose layers do not all need all of it.

Groups of full attention need every chunk up to where the request goes on; those of a sliding
window only what the window still sees from there. A hit ends where chunks of all groups end.

An example: chunks of 4 tokens, one group of full attention and one with a window of 5 tokens. Of
the first, chunks 0, 1, 2 are stored; of the second only chunk 2 (x: stored):

    tokens       0    4    8    12          to go on at 12 the window needs tokens [7, 12):
    full         [x   x   x ]               chunks 1 and 2, and chunk 1 is not there;
    window       [-   -   x ]               at 8: [3, 8), chunks 0 and 1; at 4: chunk 0: no hit.

Had the window's chunk 1 been stored as well, the hit would be 12 tokens.

* Pure: asks ``has`` about keys, each at most once, and remembers nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvconnect.offload.eviction import Key

Has = Callable[[Key], bool]


class Group(NamedTuple):
    """A KV cache group: tokens of a chunk, and how far back a token looks; None for all."""

    chunk_tokens: int
    window_tokens: int | None = None


class ChunkRange(NamedTuple):
    """Chunks ``[first, end)`` of a group."""

    first: int
    end: int


def needed(group: Group, local_tokens: int, tokens: int) -> ChunkRange:
    """Which chunks a request needs whose first ``local_tokens`` are here, to go on at ``tokens``.

    A window counts from ``tokens - 1``: after a full hit vLLM computes the last token again.
    """
    first = local_tokens
    if group.window_tokens is not None:
        first = max(first, tokens - group.window_tokens)
    if first >= tokens:
        return ChunkRange(0, 0)
    return ChunkRange(first // group.chunk_tokens, -(-tokens // group.chunk_tokens))


def hit_tokens(
    groups: Sequence[Group],
    keys: Sequence[Sequence[Key]],
    has: Has,
    local_tokens: int,
    most_tokens: int,
) -> int:
    """Length of the longest prefix after which a request can go on; at least ``local_tokens``.

    ``keys[g]`` are those of group ``g``'s chunks from the request's start on. What is between
    ``local_tokens`` and the result has to be loaded, as `needed` says.
    """
    step = math.lcm(*(group.chunk_tokens for group in groups))
    ends = [len(own) * g.chunk_tokens for g, own in zip(groups, keys, strict=True)]
    end = min([most_tokens, *ends])
    runs: list[tuple[Group, list[int]]] = []
    for group, own in zip(groups, keys, strict=True):
        first, last = local_tokens // group.chunk_tokens, end // group.chunk_tokens
        if group.window_tokens is None:
            reached = first
            while reached < last and has(own[reached]):
                reached += 1
            if reached * group.chunk_tokens > local_tokens:
                end = min(end, reached * group.chunk_tokens)
            else:
                return local_tokens
    for group, own in zip(groups, keys, strict=True):
        if group.window_tokens is not None:
            first, last = local_tokens // group.chunk_tokens, end // group.chunk_tokens
            run = [0] * (last + 1)  # run[i]: chunks [i - run[i], i) are all there
            for chunk in range(first, last):
                run[chunk + 1] = run[chunk] + 1 if has(own[chunk]) else 0
            runs.append((group, run))
    for tokens in range(end // step * step, local_tokens, -step):
        needs = ((run, needed(group, local_tokens, tokens)) for group, run in runs)
        if all(run[need.end] >= need.end - need.first for run, need in needs):
            return tokens
    return local_tokens
