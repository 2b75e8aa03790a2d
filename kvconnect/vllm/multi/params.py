"""``kv_transfer_params`` of several connectors in one: which child said what, and hears what.

The params of the first child that answers are the answer, as routers know them. Those of another
that would overwrite one of its keys travel apart, under `APART`, where its like at the other
engine finds them. Children are known by label: their connector's name, numbered where it repeats.

What comes back has been through the client's hands: whatever is odd is not looked at.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvconnect.vllm.params import STEP_KEY

APART = "kvconnect_multi"
FIRST, OTHERS = "first", "others"


def labels(names: Sequence[str]) -> list[str]:
    """One for each child, by the names of their connectors."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def merged(answers: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """One answer of all children's, by label."""
    whole: dict[str, Any] | None = None
    first, others = "", {}
    for label, params in answers.items():
        if params is None:
            continue
        if whole is None:
            whole, first = dict(params), label
        elif whole.keys() & params.keys():
            others[label] = params
        else:
            whole |= params
    if whole is not None and others:
        whole.pop(STEP_KEY, None)  # who asks both engines at once names but one child's lease
        whole[APART] = {FIRST: first, OTHERS: others}
    return whole


def split(params: Any, labels: Sequence[str]) -> dict[str, Any] | None:
    """What each child is to see; None where all see the same. Undoes `merged`."""
    apart = params.get(APART) if isinstance(params, dict) else None
    others = apart.get(OTHERS) if isinstance(apart, dict) else None
    if not isinstance(apart, dict) or not isinstance(others, dict):
        return None
    whole = {key: value for key, value in params.items() if key != APART}
    first = apart.get(FIRST)
    found: dict[str, Any] = {}
    for label in labels:
        if isinstance(own := others.get(label), dict):
            found[label] = own
        else:  # another name for the first one's kind, unless that one is here itself
            found[label] = whole if label == first or first not in labels else None
    return found


@contextmanager
def seen_as(params: Any, request: Any) -> Iterator[None]:
    """``request`` with other params, for as long as a child is asked about it."""
    whole = request.kv_transfer_params
    request.kv_transfer_params = params
    try:
        yield
    finally:
        request.kv_transfer_params = whole
