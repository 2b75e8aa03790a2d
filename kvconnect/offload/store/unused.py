"""Arenas that nobody uses any more: of other models, sizes and configurations.

* An arena that some engine writes to is locked, and left alone whatever it is for.
* One that nobody writes to is listed. It is removed once no engine has opened or closed it for
  so many days, which is the only rule; who still reads it reads on.
* What was left of an arena that was never finished is removed at once.
* A file that is no arena of ours is left alone.
"""

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path

from kvconnect.offload.store.backing import DRAFT_NAME
from kvconnect.offload.store.header import ARENA_MAGIC
from kvconnect.offload.store.neighbours import SUFFIX

logger = logging.getLogger(f"vllm.{__name__}")

DAY_S = 86_400.0
DRAFT_S = 60.0  # between making a draft and locking it passes less


def remove_unused(folder: Path, after_days: float, now_s: float | None = None) -> list[Path]:
    """List the arenas in ``folder`` that nobody writes to, and remove those out of use for so long.

    ``after_days``: 0: never. ``now_s`` as of time.time. Returns what was removed.
    """
    now_s = time.time() if now_s is None else now_s
    removed: dict[Path, str] = {}
    left: dict[Path, str] = {}
    for path, is_draft in _files(folder):
        with contextlib.suppress(OSError):  # gone, not ours to open, or of a folder that fails
            idle_s = now_s - path.stat().st_mtime
            old = idle_s > DRAFT_S if is_draft else 0 < after_days * DAY_S < idle_s
            what = f"{path} ({path.stat().st_size / 1e9:.2f} GB, {idle_s / DAY_S:.1f} days)"
            if _is_unused(path, remove=old, is_draft=is_draft):
                (removed if old else left)[path] = what
    if removed:
        logger.warning("kvconnect: unused arenas are removed: %s", "; ".join(removed.values()))
    if left:
        rule = f"after {after_days:g} days" if after_days else "by nobody"
        logger.info(
            "kvconnect: unused arenas, to be removed %s: %s", rule, "; ".join(left.values())
        )
    return list(removed)


def _files(folder: Path) -> list[tuple[Path, bool]]:
    drafts = DRAFT_NAME.format(f"*{SUFFIX}", "*")
    try:
        found = [(path, False) for path in folder.glob(f"*{SUFFIX}")]
        return sorted(found + [(path, True) for path in folder.glob(drafts)])
    except OSError:
        return []


def _is_unused(path: Path, remove: bool, is_draft: bool) -> bool:
    """Whether ``path`` is an arena that nobody writes to; nobody does while it is removed."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not is_draft and os.pread(fd, len(ARENA_MAGIC), 0) != ARENA_MAGIC:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino != os.stat(path).st_ino:  # replaced meanwhile
            return False
        if remove:
            path.unlink()
        return True
    finally:
        os.close(fd)
