"""What a worker's half asks of its engine."""

import torch

from kvconnect.vllm.engine import use_device


def test_threads_of_ours_use_the_device_of_the_caches_and_no_other(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    use_device(torch.device("cuda:3"))()
    use_device(torch.device("cpu"))()
    assert used == [torch.device("cuda:3")]
