"""Which libnccl is used, and what it does: over the fake; a real one where there is no GPU, too."""

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

import fake_gpu
import pytest
from nccl_cases import ONE_RANK, TWO_RANKS, ranks

from kvconnect.errors import ConfigError, TransportError
from kvconnect.ops import native
from kvconnect.transport.nccl import library as nccl_library
from kvconnect.transport.nccl.library import Nccl, find

pytestmark = pytest.mark.slow  # a compiler runs first
VARIABLE = "KVCONNECT_NCCL_LIBRARY"


@pytest.fixture
def path(gpu, fake_gpu_folder):
    return os.fspath(fake_gpu_folder / "libnccl.so.2")


@pytest.fixture
def nccl(path):
    return Nccl(path)


@pytest.mark.parametrize("case", {**ONE_RANK, **TWO_RANKS}.values(), ids={**ONE_RANK, **TWO_RANKS})
def test_the_fake_is_as_nccl(nccl, case):
    case(nccl)


def test_an_error_shows_when_asked_for(nccl, gpu):
    with ranks(nccl, 2) as (left, _):
        gpu.set(**{"async": 6})
        with pytest.raises(TransportError, match="remote process exited"):
            left.communicator.ready()


def test_what_fails_at_once_leaves_nothing(nccl, gpu):
    gpu.set(init=2)
    with pytest.raises(TransportError, match=r"unhandled system error.*planned fault"):
        nccl.communicator(nccl.unique_id(), 0)
    assert gpu.get("alive") == 0


def test_an_older_nccl_is_a_startup_error(path, gpu):
    gpu.set(version=21602)
    with pytest.raises(ConfigError, match=r"NCCL 2\.16\.2, expected at least 2\.17\.0"):
        Nccl(path)


def test_what_a_library_lacks_is_named():
    with pytest.raises(ConfigError, match=r"lacks ncclGetVersion, .*ncclCommInitRankConfig"):
        Nccl("libm.so.6")


def test_a_library_that_is_not_there_is_a_startup_error():
    with pytest.raises(ConfigError, match="nowhere"):
        Nccl("/nowhere/libnccl.so.2")


def test_the_one_named_is_used_before_all_others(path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/nowhere/libnccl.so.2")
    assert find(path) == path
    with pytest.raises(ConfigError, match="nowhere"):
        find()
    monkeypatch.setenv(VARIABLE, path)
    assert find() == path


def test_the_one_that_is_loaded_is_used(path, tmp_path, monkeypatch):
    for variable in nccl_library.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    loaded = tmp_path / "libnccl.so.2.99"
    shutil.copy(path, loaded)
    ctypes.CDLL(os.fspath(loaded))
    assert find() == os.fspath(loaded)


def test_without_kernels_nccl_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIB", tmp_path)
    with pytest.raises(ConfigError, match="without CUDA kernels"):
        find()


def cuda_devices():
    try:
        return native.open_library("kvc_cuda").kvc_cuda_device_count()
    except OSError as e:
        pytest.skip(f"no CUDA kernels: {e}")


def test_without_a_device_nccl_cannot_be_used():
    if cuda_devices():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no CUDA device"):
        find()


def installed():
    """Folder of NVIDIA's own NCCL, if its wheel is here or NCCL_HOME says where."""
    if os.environ.get("NCCL_HOME"):
        return Path(os.environ["NCCL_HOME"])
    try:
        wheel = importlib.util.find_spec("nvidia.nccl")
    except ImportError:
        wheel = None
    if wheel is None:
        pytest.skip("no nvidia-nccl wheel, and NCCL_HOME is not set")
    return Path(wheel.submodule_search_locations[0])


def test_the_fake_has_the_declarations_of_nvidias_header(tmp_path):
    header = installed() / "include"
    for absent in ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"):
        (tmp_path / absent).touch()
    fake_gpu.build(tmp_path, f"-I{header}", f"-I{tmp_path}")


def test_a_real_library_will_do_and_says_what_it_lacks():
    real = Nccl(os.fspath(installed() / "lib" / nccl_library.SONAME))
    assert real.version >= nccl_library.NEEDED
    ONE_RANK["unique_ids_are_unique"](real)
    if not cuda_devices():
        with pytest.raises(TransportError, match="unhandled cuda error"):
            real.communicator(real.unique_id(), 0, 1)
