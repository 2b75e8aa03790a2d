"""Hypothesis profiles: HYPOTHESIS_PROFILE=dev while writing, ci otherwise."""

import logging
import os

import fake_gpu
import pytest
from hypothesis import HealthCheck, settings

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=300, print_blob=True, **common)
settings.register_profile("dev", max_examples=40, **common)
settings.register_profile("deep", max_examples=5000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def what_we_log_reaches_caplog(monkeypatch):
    """vLLM, once imported, keeps what is logged below its logger from pytest's handler."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)


@pytest.fixture(scope="session")
def fake_gpu_folder(tmp_path_factory):
    """Where a GPU's libraries are, made for a CPU; see fake_gpu."""
    if fake_gpu.COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("fake-gpu")
    fake_gpu.build(folder)
    return folder


@pytest.fixture
def gpu(fake_gpu_folder, monkeypatch):
    """A GPU and NCCL, faked; nothing may be left on it."""
    fake = fake_gpu.use(fake_gpu_folder, monkeypatch)
    yield fake
    assert fake.library.kvc_fake_count(b"device") == 0, "another device was left the current one"
    fake.reset()
    assert fake.get("alive") == 0, "a communicator is left"
    assert fake.library.kvc_fake_count(b"memory") == 0, "device memory is left"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What hostile text a test had logged must not end the worker that reports on it."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report
