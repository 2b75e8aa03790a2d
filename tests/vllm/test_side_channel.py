"""Where a rank's control channel listens."""

from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig

from kvconnect.errors import ConfigError
from kvconnect.vllm.engine import Rank
from kvconnect.vllm.worker import DEFAULT_KV_PORT, side_channel

PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "10.0.0.1")
    monkeypatch.delenv(PORT, raising=False)


def config(kv_port=21001, replica=0):
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_port=kv_port),
        parallel_config=SimpleNamespace(data_parallel_index=replica),
    )


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_who_listens_everywhere_says_an_address_that_others_reach(monkeypatch, everywhere):
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", everywhere)
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    assert side_channel(config(), FIRST, at_kv_port=False) == ("10.0.0.7", 0)
    monkeypatch.setenv("VLLM_HOST_IP", "0.0.0.0")
    assert side_channel(config(), FIRST, at_kv_port=False) == ("127.0.0.1", 0)


def test_the_default_of_kv_port_is_vllms():
    assert KVTransferConfig().kv_port == DEFAULT_KV_PORT


FIRST, SECOND = Rank(0, 2, 0, 2), Rank(1, 2, 0, 2)


def test_the_port_is_a_free_one_unless_vllms_variable_says_the_first_ranks(monkeypatch):
    assert side_channel(config(), FIRST, at_kv_port=False) == ("10.0.0.1", 0)
    monkeypatch.setenv(PORT, "5600")
    assert side_channel(config(replica=2), FIRST, at_kv_port=False) == ("10.0.0.1", 5602)
    assert side_channel(config(), SECOND, at_kv_port=False) == ("10.0.0.1", 0)
    monkeypatch.setenv(PORT, "many")
    with pytest.raises(ConfigError, match="'many', expected a port number"):
        side_channel(config(), FIRST, at_kv_port=False)


def test_the_first_rank_is_at_kv_port_where_request_ids_look_for_it(monkeypatch):
    monkeypatch.setenv(PORT, "5600")
    assert side_channel(config(), FIRST, at_kv_port=True) == ("10.0.0.1", 21001)
    assert side_channel(config(), SECOND, at_kv_port=True) == ("10.0.0.1", 0)
    # each engine of a data-parallel group has as many ports as ranks
    assert side_channel(config(replica=1), FIRST, at_kv_port=True) == ("10.0.0.1", 21005)
    assert side_channel(config(kv_port=0, replica=1), FIRST, at_kv_port=True) == ("10.0.0.1", 0)
