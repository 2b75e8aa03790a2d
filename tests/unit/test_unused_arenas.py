"""Arenas of other configurations: who is in use stays, what nobody uses goes by one rule."""

import os
import subprocess
import sys
import time

import pytest

from kvconnect.offload.store.backing import DRAFT_NAME
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.limits import memory_room
from kvconnect.offload.store.neighbours import claim
from kvconnect.offload.store.unused import DAY_S, remove_unused

OURS, OTHER = b"\x01" * 32, b"\x02" * 32


def spec(fingerprint):
    return ArenaSpec(2, 4096, fingerprint)


def leave_one(folder, fingerprint=OTHER):
    """An arena whose engine has ended."""
    arena, path = claim(folder, spec(fingerprint))
    arena.close()
    return path


def in_days(days):
    return time.time() + days * DAY_S


def test_an_arena_that_nobody_uses_is_listed_and_goes_after_its_days(tmp_path, caplog):
    caplog.set_level("INFO")
    path = leave_one(tmp_path)
    assert remove_unused(tmp_path, 7, in_days(6.9)) == []
    assert str(path) in caplog.text and "to be removed after 7 days" in caplog.text
    assert remove_unused(tmp_path, 7, in_days(7.1)) == [path] and not path.exists()
    assert "unused arenas are removed" in caplog.text


def test_never_is_never(tmp_path):
    path = leave_one(tmp_path)
    assert remove_unused(tmp_path, 0, in_days(1000)) == [] and path.exists()


def test_an_arena_in_use_is_left_alone_however_old(tmp_path):
    arena, path = claim(tmp_path, spec(OURS))
    code = (
        "import sys, pathlib, kvconnect.offload.store.unused as u;"
        f"print(u.remove_unused(pathlib.Path({str(tmp_path)!r}), 1, {in_days(9)}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]" and path.exists()
    arena.close()


@pytest.mark.parametrize("event", ["opened", "closed"])
def test_its_days_count_from_when_an_engine_last_opened_or_closed_it(tmp_path, event):
    """What is written to mapped memory does not change a file's time."""
    path = leave_one(tmp_path)
    os.utime(path, (1, 1))
    if event == "closed":
        arena, _ = claim(tmp_path, spec(OTHER))
        os.utime(path, (1, 1))
        arena.close()
    else:
        arena, _ = claim(tmp_path, spec(OTHER))
        times = path.stat()
        arena.close()
        os.utime(path, (times.st_atime, times.st_mtime))
    assert remove_unused(tmp_path, 7, in_days(6)) == []


def test_what_is_no_arena_is_left_alone(tmp_path):
    note = tmp_path / "note.kvarena"
    note.write_text("not yours")
    target = leave_one(tmp_path / "elsewhere")
    (tmp_path / "link.kvarena").symlink_to(target)
    (tmp_path / "folder.kvarena").mkdir()
    assert remove_unused(tmp_path, 1, in_days(100)) == []
    assert note.exists() and target.exists()
    assert remove_unused(tmp_path / "none", 1) == []


def test_what_was_never_finished_goes_unless_somebody_is_at_it(tmp_path):
    path = leave_one(tmp_path)
    draft = path.with_name(DRAFT_NAME.format(path.name, "00ff"))
    draft.write_bytes(bytes(10))
    assert remove_unused(tmp_path, 0) == [], "it may be just being made"
    assert remove_unused(tmp_path, 0, time.time() + 100) == [draft]


def test_who_reads_an_arena_that_is_removed_reads_on(tmp_path):
    path = leave_one(tmp_path)
    with path.open("rb") as reader:
        remove_unused(tmp_path, 1, in_days(2))
        assert not path.exists() and len(reader.read()) == spec(OTHER).nbytes


# -- limits ----------------------------------------------------------------------------------

LIMIT = 5 << 30
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("group", "file"),
    {
        "2, of a container": ("0::/", "sys/fs/cgroup/memory.max"),
        "2, of a service": ("0::/system.slice/a", "sys/fs/cgroup/system.slice/a/memory.max"),
        "2, of what it is in": ("0::/system.slice/a", "sys/fs/cgroup/system.slice/memory.max"),
        "2, a path of the host": ("0::/kubepods/x", "sys/fs/cgroup/memory.max"),
        "1": ("4:memory:/docker/x", f"{V1}/docker/x/memory.limit_in_bytes"),
        "1, a path of the host": ("4:cpu,memory:/docker/x", f"{V1}/memory.limit_in_bytes"),
    }.values(),
)
def test_a_container_s_limit_is_seen(tmp_path, group, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/x\n{group}\n")
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("max\n")
    host = memory_room(tmp_path)
    assert host.source == "the host's memory"
    path.write_text(f"{LIMIT}\n")
    found = memory_room(tmp_path)
    assert found.nbytes == LIMIT < host.nbytes and found.source == f"the limit in /{file}"


def test_without_groups_it_is_the_host_s(tmp_path):
    assert memory_room(tmp_path).source == "the host's memory"
