"""A real libnccl: the same cases as the fake's, and the transport's contract.

Two ranks on one GPU need NCCL 2.30 or later (NCCL_MULTI_RANK_GPU_ENABLE); else two GPUs.
"""

import mmap

import nccl_cases
import pytest
from fake_gpu import as_device
from nccl_cases import ONE_RANK, TWO_RANKS

from kvconnect.errors import ConfigError
from kvconnect.testing.transport import CHECKS
from kvconnect.transport.nccl.library import Nccl, find
from kvconnect.transport.registry import make_transport

SHARED_GPU = 2_30_00  # the first NCCL that lets two ranks have one GPU
PORTABLE = 1  # cudaHostRegisterPortable: for all devices


@pytest.fixture
def nccl(monkeypatch):
    torch = pytest.importorskip("torch")
    torch.zeros(1, device="cuda")  # as in an engine: torch has loaded its NCCL and has a context
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    try:
        return Nccl(find())
    except ConfigError as e:
        pytest.skip(str(e))


@pytest.fixture
def devices(nccl, monkeypatch):
    """Of two ranks."""
    import torch

    if torch.cuda.device_count() > 1:
        monkeypatch.setattr(nccl_cases, "DEVICES", [0, 1])
    elif nccl.version < SHARED_GPU:
        pytest.skip(f"one GPU, and NCCL {nccl.version} wants one for each rank")
    return nccl_cases.DEVICES


@pytest.mark.parametrize("case", ONE_RANK.values(), ids=ONE_RANK)
def test_one_rank(nccl, case):
    case(nccl)


@pytest.mark.parametrize("case", TWO_RANKS.values(), ids=TWO_RANKS)
def test_two_ranks(nccl, devices, case):
    case(nccl)


def pages(region):
    """(address, bytes) of what has to be registered for a region of host memory."""
    first = region.address // mmap.PAGESIZE * mmap.PAGESIZE
    return first, region.address + region.nbytes - first


def reaching(regions, device):
    """A transport for host memory that every GPU reaches at its own address, until it is closed."""
    import torch

    cudart = torch.cuda.cudart()
    for region in regions:
        failed = int(cudart.cudaHostRegister(*pages(region), PORTABLE))
        assert not failed, f"cudaHostRegister: error {failed}"
    transport = make_transport("nccl", as_device(regions, device), "127.0.0.1", {})
    close, left = transport.close, list(regions)

    def close_both():
        close()
        while left:
            cudart.cudaHostUnregister(pages(left.pop())[0])

    transport.close = close_both
    return transport


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_it_keeps_the_contract(nccl, devices, check):
    """The suite's memory is the host's: the kernels reach it, and NCCL sees staging only."""
    check(lambda *sides: [reaching(*side) for side in zip(sides, devices, strict=True)])
