"""Engines for the end-to-end tests: each kind is started once, by the first test that wants it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import Pair, Setup

from kvconnect.cli.processes import Fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


def model(variable: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    assert (path / "config.json").is_file(), f"{variable} names no model: run `make setup`"
    return path


def started(tmp_path_factory: pytest.TempPathFactory, setup: Setup) -> Iterator[Pair]:
    with Fleet(tmp_path_factory.mktemp("engines")) as fleet:
        yield Pair(fleet, setup)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """SmolLM2, one rank each, short leases, failed loads are recomputed."""
    setup = Setup(
        model("KVCONNECT_MODEL"),
        extra={"kv_lease_duration": 10},
        policy="recompute",
        prefill=["--max-num-batched-tokens", "1024"],  # long prompts are prefilled in chunks
        both=["--max-model-len", "4200"],
    )
    yield from started(tmp_path_factory, setup)


@pytest.fixture(scope="module")
def secret_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """TP 1 → 2, with a shared secret, under vLLM's own name; failed loads are errors."""
    secret = tmp_path_factory.mktemp("secret") / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    setup = Setup(
        model("KVCONNECT_TP_MODEL"),
        decode=["--tensor-parallel-size", "2"],
        extra={"auth_secret_file": str(secret), "kv_lease_duration": 10},
        names={"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"},
    )
    yield from started(tmp_path_factory, setup)


@pytest.fixture(scope="module")
def crowded_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """TP 2 → 1, with so few blocks that requests are preempted."""
    setup = Setup(
        model("KVCONNECT_TP_MODEL"),
        prefill=["--tensor-parallel-size", "2"],
        both=["--num-gpu-blocks-override", "40", "--max-model-len", "2048"],
        extra={"kv_lease_duration": 10},
        policy="recompute",
    )
    yield from started(tmp_path_factory, setup)


@pytest.fixture(scope="module")
def hybrid_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Sliding-window and full-attention layers: several KV cache groups."""
    setup = Setup(model("KVCONNECT_HMA_MODEL"), extra={"kv_lease_duration": 10})
    yield from started(tmp_path_factory, setup)


@pytest.fixture(scope="module")
def pipeline_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Pipeline-parallel prefill. vLLM's CPU worker cannot run PP with --enforce-eager (its
    gpu_model_runner.py asserts on intermediate_tensors that only the compile warm-up makes)."""
    setup = Setup(
        model("KVCONNECT_TP_MODEL"),
        prefill=["--pipeline-parallel-size", "2", "--no-enforce-eager"],
    )
    yield from started(tmp_path_factory, setup)
