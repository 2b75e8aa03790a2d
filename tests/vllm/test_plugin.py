"""Connectors are known to vLLM under their names; names that vLLM has itself stay its own."""

import importlib

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvconnect.vllm import CONNECTORS
from kvconnect.vllm.plugin import REGISTERED, register


@pytest.fixture
def registry(monkeypatch):
    empty: dict[str, object] = {}
    monkeypatch.setattr(KVConnectorFactory, "_registry", empty)
    return empty


def test_every_class_is_found_by_its_own_name(registry):
    """vLLM's MultiConnector looks a child's statistics up by the name of its class."""
    register()
    register()
    assert registry.keys() == REGISTERED.keys()
    by_path = importlib.import_module("kvconnect.vllm")
    for found in [load() for load in registry.values()] + [getattr(by_path, n) for n in CONNECTORS]:
        assert registry[found.__name__]() is found


@pytest.mark.parametrize("name", REGISTERED)
def test_a_connector_that_vllm_has_is_left_alone(registry, name):
    """Until 0.23 it had a P2pNcclConnector."""
    registry[name] = theirs = object()
    register()
    assert registry[name] is theirs
    assert registry.keys() == REGISTERED.keys()


def test_who_is_found_by_module_path_is_registered_too(registry):
    """As children of in-tree MultiConnector have to be, whatever VLLM_PLUGINS leaves out."""
    assert importlib.import_module("kvconnect.vllm").NixlConnector
    assert "KVConnectNixl" in registry
