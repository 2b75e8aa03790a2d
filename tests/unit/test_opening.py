"""A rank's place for stored KV, as it is opened when the engine starts."""

import os

import pytest
from store_bench import BLOCKS, CHUNK, FINGERPRINT, MODEL, key_of

from kvconnect.config import parse
from kvconnect.errors import StoreError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.jobs import Fill, Save, Spill
from kvconnect.offload.store import numa
from kvconnect.offload.store.limits import MemoryLimit
from kvconnect.offload.store.slot_layout import SlotLayout
from kvconnect.ops import load
from kvconnect.vllm.offload import opening as module
from kvconnect.vllm.offload.opening import open_replica, open_store
from kvconnect_bench.caches import Cache

MEMORY = 1 << 20
UNHAD = 1 << 49  # more than a file can be long


class Rank:
    """A place over a cache; `run` carries out a job."""

    def __init__(self, ranks=1, fingerprint=FINGERPRINT, followed=False, nodes=(), **options):
        self.cache = Cache(MODEL, BLOCKS)
        config = parse({"cpu_bytes_to_use": MEMORY} | options, OffloadConfig, "test")
        slot_layout = SlotLayout(self.cache.shard, 0, CHUNK, load("cpu"))
        self.kept = open_store(
            config, ranks, fingerprint, [slot_layout], nodes=nodes, followed=followed
        )

    def run(self, job):
        """Its error; empty if it went well."""
        runner = self.kept.runner
        runner.put([job])
        for _ in range(10_000):
            runner.step()
            for answer in runner.take().done:
                assert answer.id == job.number
                return answer.error
        raise AssertionError("it does not end")

    def store(self, seed):
        self.cache.fill((0, 1), seed)
        assert not self.run(Save(1, key_of(seed), 0, (0, 1)))

    def load(self, seed):
        """Whether it was loaded."""
        self.cache.fill((4, 5), 999)
        well = not self.run(Fill(2, key_of(seed), 0, (4, 5)))
        assert well == self.cache.holds_fill([(0, 4), (1, 5)], seed)
        return well


@pytest.fixture
def opened(tmp_path):
    """Makes ranks, and closes them."""
    ranks = []

    def make(*args, **options):
        ranks.append(Rank(*args, **options))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.kept.close()


def test_a_disk_that_has_no_room_leaves_memory_at_work(opened, tmp_path, caplog):
    """It used to turn all of offloading off."""
    rank = opened(disk_path=str(tmp_path), disk_bytes=UNHAD)
    assert rank.kept.lead.disk_slots == 0
    assert "memory only" in caplog.text
    assert list(tmp_path.iterdir()) == [], "what could not be made was left"
    rank.store(3)
    assert rank.load(3)
    assert rank.run(Spill(5, key_of(3))), "there is no disk"


def test_a_file_where_the_folder_should_be_is_an_error(opened, tmp_path):
    """It used to be a line in the log of an engine that then kept nothing on disk."""
    (tmp_path / "disk").write_text("")
    with pytest.raises(StoreError, match="disk"):
        opened(disk_path=str(tmp_path / "disk"), disk_bytes=MEMORY)


def test_memory_that_cannot_be_had_is_an_error(opened, tmp_path):
    with pytest.raises(StoreError):
        opened(persist=True, memory_path=str(tmp_path), cpu_bytes_to_use=UNHAD)
    with pytest.raises(StoreError, match="more than the host's memory"):
        opened(cpu_bytes_to_use=UNHAD)
    with pytest.raises(StoreError, match="cpu_bytes_to_use leaves 1024 bytes to a rank"):
        opened(ranks=1024)


def test_memory_beyond_a_container_s_limit_is_an_error_at_the_start(opened, monkeypatch):
    """The kernel would end the engine when it fills it."""
    monkeypatch.setattr(module, "memory_room", lambda: MemoryLimit(MEMORY // 2, "the limit in /x"))
    with pytest.raises(StoreError, match=r"more than the limit in /x, \d+ bytes; give less"):
        opened()
    monkeypatch.setattr(module, "memory_room", lambda: MemoryLimit(MEMORY, "the limit in /x"))
    opened()


@pytest.mark.parametrize("persist", [True, False])
def test_what_was_stored_is_found_again_only_if_it_persists(opened, tmp_path, persist):
    options = {"disk_path": str(tmp_path / "disk"), "disk_bytes": MEMORY, "share": True}
    options |= {"memory_path": str(tmp_path / "memory"), "persist": persist}
    first = opened(**options)
    first.store(3)
    assert not first.run(Spill(4, key_of(3)))
    first.kept.close()
    again = opened(**options)
    assert again.kept.lead.keys == (([key_of(3)],) * 2 if persist else ([], []))
    assert again.load(3) == persist
    assert not opened(**options).kept.lead.keys[0], "an arena had two writers"


def test_what_another_fingerprint_stored_is_never_found(opened, tmp_path):
    options = {"persist": True, "memory_path": str(tmp_path)}
    opened(**options).store(3)
    other = opened(fingerprint=b"\x06" * 32, **options)
    assert other.kept.lead.keys == ([], [])
    assert not other.load(3)


def test_who_follows_takes_no_other_arena_for_the_leader_s(opened):
    """A path in /proc is another file's, once its process has ended."""
    leader = opened(followed=True)
    config = parse({"cpu_bytes_to_use": MEMORY}, OffloadConfig, "test")
    slot_layout = SlotLayout(leader.cache.shard, 0, CHUNK, load("cpu"))
    open_replica(config, leader.kept.lead, FINGERPRINT, [slot_layout]).close()
    for other in (
        leader.kept.lead._replace(identity=bytes(16)),
        leader.kept.lead._replace(path="/proc/self/fd/9999"),
    ):
        with pytest.raises(StoreError, match="is not there, or another arena"):
            open_replica(config, other, FINGERPRINT, [slot_layout])
    with pytest.raises(StoreError):
        open_replica(config, leader.kept.lead, bytes(32), [slot_layout])


def test_memory_in_dev_shm_lies_in_a_folder_of_ours_alone(opened, tmp_path, monkeypatch):
    """Anybody may make a folder there, and would read or forge what we store."""
    monkeypatch.setattr(module, "SHARED_MEMORY", str(tmp_path / "kvconnect-{}"))
    folder = tmp_path / f"kvconnect-{os.getuid()}"
    opened(persist=True)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o750)
    with pytest.raises(StoreError, match="ours alone"):
        opened(persist=True)
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        other = os.getuid() + 1
        patch.setattr(module.os, "getuid", lambda: other)
        patch.setattr(module, "SHARED_MEMORY", str(folder))
        with pytest.raises(StoreError, match="ours alone"):
            opened(persist=True)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="ours alone"):
        opened(persist=True)


@pytest.mark.parametrize("options", [{}, {"followed": True}, {"persist": True}], ids=str)
def test_memory_is_wished_near_to_its_rank(opened, tmp_path, monkeypatch, options):
    wished = []
    monkeypatch.setattr(numa, "prefer", lambda memory, nodes: wished.append((memory.nbytes, nodes)))
    if "persist" in options:
        options = options | {"memory_path": str(tmp_path / "memory")}
    disk = {"disk_path": str(tmp_path / "disk"), "disk_bytes": MEMORY}
    rank = opened(nodes=(1,), **disk, **options)
    assert wished == [(rank.kept.memory.spec.nbytes, (1,))], "a disk is no memory"
