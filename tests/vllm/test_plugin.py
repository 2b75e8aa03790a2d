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


def test_every_name_is_that_of_its_class(registry):
    """vLLM's MultiConnector looks a child's statistics up by the name of its class."""
    register()
    register()
    assert registry.keys() == REGISTERED.keys()
    for name, load in registry.items():
        assert load().__name__ == name


def test_every_name_is_found_by_module_path():
    for name in {*REGISTERED, *CONNECTORS}:
        assert getattr(importlib.import_module("kvconnect.vllm"), name).__name__ == name


@pytest.mark.parametrize("name", REGISTERED)
def test_a_connector_that_vllm_has_is_left_alone(registry, name):
    """Until 0.23 it had a P2pNcclConnector."""
    registry[name] = theirs = object()
    register()
    assert registry[name] is theirs
    assert registry.keys() == REGISTERED.keys()
