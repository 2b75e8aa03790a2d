"""Where the offloading connector has its host memory."""

from types import SimpleNamespace

import torch

from kvconnect.vllm.offload.worker import pci_address


def test_a_gpu_is_named_as_sysfs_names_it(monkeypatch):
    found = {1: SimpleNamespace(pci_domain_id=1, pci_bus_id=0xDC, pci_device_id=2)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device.index])
    assert pci_address(torch.device("cuda:1")) == "0001:dc:02.0"
    assert pci_address(torch.device("cpu")) is None
