"""A finding: a line of what was seen, how bad it is, and what to do about it."""

import contextlib
import enum
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from kvconnect.errors import KvConnectError


class Verdict(enum.IntEnum):
    """How bad a finding is. The command's exit status is the worst one."""

    OK = 0
    WARNING = 1
    FAULT = 2


class Finding(NamedTuple):
    """``fact`` was seen of ``subject``. A remedy of one that is OK is a hint."""

    subject: str
    fact: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def fault(subject: str, error: object, remedy: str = "") -> Finding:
    """An error of ours as a finding: what it says after its last semicolon is the remedy."""
    fact, _, said = str(error).rpartition("; ")
    if not fact:
        fact, said = said, ""
    return Finding(subject, fact, Verdict.FAULT, said or remedy)


def findings(
    checks: Mapping[str, Check], tell: Callable[[str], object] = lambda _: None
) -> Iterator[Finding]:
    """What all checks find. One that raises is a finding, and the others go on.

    ``tell`` is told the name of each check before it runs.
    """
    for name, check in checks.items():
        tell(name)
        try:
            yield from check()
        except KvConnectError as e:
            yield fault(name, e)
        except Exception as e:  # whatever a machine has come up with, the rest is wanted
            said = f"cannot be checked: {type(e).__name__}: {e}"
            yield Finding(name, said, Verdict.WARNING, "report it, with this line")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is logged meanwhile is told as findings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
