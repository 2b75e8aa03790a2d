"""docs/transports.md is true: a transport of another package, in under 200 lines."""

import importlib
from pathlib import Path

import pytest
from test_transports import Reader, every_check

from kvconnect.errors import ConfigError
from kvconnect.transport import registry
from kvconnect.transport.registry import make_transport

SOURCE = Path(__file__).with_name("acme_kv.py")


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """The package is installed; its transport's name."""
    metadata = tmp_path / "acme_kv-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kv\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.GROUP}]\nacme = acme_kv:make\n")
    (tmp_path / "acme_kv.py").write_text(SOURCE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")  # of the other process
    importlib.invalidate_caches()
    return "acme"


def test_it_is_as_short_as_the_guide_says():
    assert len(SOURCE.read_text().splitlines()) < 200


@every_check
def test_it_keeps_the_contract(check, acme):
    check(lambda *sides: [make_transport(acme, regions, "127.0.0.1", {}) for regions in sides])


def test_it_says_what_it_cannot_do(acme):
    with pytest.raises(ConfigError, match="no options"):
        make_transport(acme, [], "127.0.0.1", {"speed": "high"})


@pytest.mark.slow
def test_a_peer_that_is_killed_ends_its_transfers(acme):
    reader = Reader(acme)
    try:
        reader.read_all()
        transfers = [reader.submit(shift) for shift in range(1, 4)]
        reader.process.kill()
        reader.process.wait()
        ended = reader.poll(3, seconds=5)
        assert sorted(done.transfer_id for done in ended) == transfers
        before = reader.memory.copy()
        assert reader.poll(1, seconds=0.1) == []
        assert (reader.memory == before).all()
    finally:
        reader.close()
