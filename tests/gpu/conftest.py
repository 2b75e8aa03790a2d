"""Tests that need a GPU, torch with CUDA and libkvc_cuda, and no vLLM: `make test-gpu`."""

import sys
from pathlib import Path

import pytest

from kvconnect.ops.native import LIB

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # ops_cases


def reason_to_skip():
    """Why nothing here can run, or None."""
    try:
        import torch
    except ImportError:
        return "no torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not (LIB / "libkvc_cuda.so").exists():
        return "libkvc_cuda is not built: put nvcc on PATH and run `make test-gpu`"
    return None


def pytest_collection_modifyitems(items):
    """A reason for each test here, or none for all."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = reason_to_skip() if here else None
    if reason:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
