"""Processes that die while they store, and filesystems that are full: never wrong KV."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def killed(*options):
    shown = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert shown.stdout, shown.stderr
    return json.loads(shown.stdout)


@pytest.mark.slow
def test_killed_while_they_store_engines_leave_nothing_wrong_behind():
    """The long version: python tests/unit/killing.py --times 200"""
    report = killed("--times", "25")
    assert report["wrong"] == 0, report
    assert report["problems"] == []
    assert report["misses"] == 0, "its header was right, and its content was not there"
    assert report["kills"] == 25
    assert report["kills_in_a_store"] > 5, "it was hardly ever killed in a store"
    assert report["found"] > 5, "hardly anything was there to be wrong"


@pytest.mark.slow
def test_an_engine_that_dies_harms_no_other_that_shares_with_it():
    """The long version: python tests/unit/killing.py --times 50 --share"""
    report = killed("--times", "10", "--share")
    assert report["wrong"] == 0, report
    assert report["problems"] == []
    assert report["kills_in_a_store"] > 2
    assert report["neighbour_loads"] > 0, "the living one never loaded anything of the others'"


FULL = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from store_bench import Bench, claim, key_of, FileBacking, FINGERPRINT, ArenaSpec
from kvconnect.errors import Reason, StoreError
folder = Path(sys.argv[1])
for wrap in (FileBacking, None):
    try:
        claim(folder / "big", ArenaSpec(1000, 4096, FINGERPRINT), *([wrap] if wrap else []))
    except StoreError as e:
        assert e.reason is Reason.FULL, e
    else:
        raise AssertionError("there is no room for it")
assert list((folder / "big").iterdir()) == []
bench = Bench(folder)
with open(folder / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as e:
        print("full:", e.strerror)
for seed in range(12):
    bench.store.forget(key_of(max(seed - 4, 0)))
    assert bench.save(seed)
    bench.spill(seed)
for seed in range(12):
    bench.store.forget(key_of(seed))
assert [bench.load(seed) for seed in range(4)] == [True] * 4
bench.close()
print("right")
"""


@pytest.mark.slow
def test_a_filesystem_that_fills_up_under_it_does_not_matter(tmp_path):
    """Room is reserved when an arena is made: the rest of the disk may be full."""
    mount = "mount -t tmpfs -o size=300k none {0} && exec {1} -c '{2}' {0}"
    command = mount.format(tmp_path, sys.executable, FULL.replace("'", '"'))
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none {tmp_path}"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no filesystem can be mounted here")
    shown = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False
    )
    assert shown.stdout.splitlines() == ["full: No space left on device", "right"], shown.stderr
    assert os.listdir(tmp_path) == []
