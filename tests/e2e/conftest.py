"""Engines for the end-to-end tests: one pair at a time, since idle ranks of TP > 1 spin.

Tests are grouped by the pair they ask for, so each is started once.
"""

import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import multi
import pytest
from identities import copy_of, write_adapter
from nursery import Nursery
from pair import IPV6, SPOIL_FILE, Pair, Setup, has_ipv6
from solo import SharersSetup, Solo, SoloSetup
from xpyd import XpydSetup, free_port

from kvconnect.cli.processes import HOST, Fleet, Launch, Process, launch

HERE = Path(__file__).parent
SHORT = ("--max-model-len", "2048")


def model(variable: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    assert (path / "config.json").is_file(), f"{variable} names no model: run `make setup`"
    return path


def pair(folder: Path) -> Setup:
    """SmolLM2, one rank each, short leases, failed loads are recomputed; decode's KV events."""
    events = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{free_port()}"}
    return Setup(
        model("KVCONNECT_MODEL"),
        extra={"kv_lease_duration": 10},
        policy="recompute",
        prefill=["--max-num-batched-tokens", "1024"],  # long prompts are prefilled in chunks
        decode=["--kv-events-config", json.dumps(events)],
        both=["--max-model-len", "4200"],
        env={"VLLM_SERVER_DEV_MODE": "1"},  # reset and pause
    )


def secret_pair(folder: Path) -> Setup:
    """TP 1 → 2, with a shared secret, under vLLM's own name; failed loads are errors."""
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        decode=["--tensor-parallel-size", "2"],
        # two ranks that spin leave little of two cores to anybody else: be patient
        extra={"auth_secret_file": str(secret), "handshake_timeout": 60, "kv_lease_duration": 90},
        names={"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"},
    )


def crowded_pair(folder: Path) -> Setup:
    """TP 2 → 1, with so few blocks that requests are preempted."""
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        prefill=["--tensor-parallel-size", "2"],
        both=["--num-gpu-blocks-override", "40", "--max-model-len", "2048"],
        policy="recompute",
    )


def identity_pair(folder: Path) -> Setup:
    """One model at two paths, with two adapters: one at two paths as well, and one that has other
    weights on the other side. Decode alone speculates, by n-grams."""
    ours = model("KVCONNECT_TP_MODEL")  # adapters are slow on a CPU
    adapters = {}
    for role, clash in {"prefill": 2, "decode": 3}.items():
        seeds = {"shared": 1, "clash": clash}
        paths = {n: write_adapter(folder / role / n, ours, seed) for n, seed in seeds.items()}
        adapters[role] = ["--lora-modules", *(f"{name}={path}" for name, path in paths.items())]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    return Setup(
        ours,
        prefill_model=copy_of(ours, folder / "elsewhere"),
        prefill=adapters["prefill"],
        decode=[*adapters["decode"], "--speculative-config", json.dumps(ngram)],
        both=["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", *SHORT],
        extra={"kv_lease_duration": 10},  # of what decode refuses
        policy="recompute",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )


def hybrid_pair(folder: Path) -> Setup:
    """Sliding-window and full-attention layers: several KV cache groups. Over IPv6, if there is."""
    host = IPV6 if has_ipv6() else HOST
    return Setup(model("KVCONNECT_HMA_MODEL"), env={"VLLM_NIXL_SIDE_CHANNEL_HOST": host})


def hybrid_blocks_pair(folder: Path) -> Setup:
    """Sliding windows of which prefill, with smaller blocks, lets go of more than decode's hold."""
    return Setup(
        model("KVCONNECT_HMA_MODEL"),
        prefill=["--block-size", "32"],
        decode=["--block-size", "128"],
    )


def pipeline_pair(folder: Path) -> Setup:
    """Pipeline-parallel prefill. vLLM's CPU worker cannot run PP with --enforce-eager: its
    gpu_model_runner.py asserts on intermediate_tensors that only the compile warm-up makes."""
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        prefill=["--pipeline-parallel-size", "2", "--no-enforce-eager"],
    )


def small_blocks_pair(folder: Path) -> Setup:
    """Blocks of 32 tokens at prefill, of 128 at decode: only the staged path can map them.

    Decode lends what it has answered with, and prefill loads it."""
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        extra={"bidirectional_kv_xfer": True},
        prefill=["--block-size", "32", "--tensor-parallel-size", "2"],
        decode=["--block-size", "128"],
    )


def streaming_pair(folder: Path) -> Setup:
    """TP 2 → 1: prefill computes 256 tokens a step, in blocks of 32; decode has blocks of 128.

    With a secret.
    """
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    steps = ["--block-size", "32", "--max-num-batched-tokens", "256"]
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        prefill=[*steps, "--tensor-parallel-size", "2"],
        decode=["--block-size", "128"],
        both=SHORT,
        # two ranks that spin leave little of two cores to anybody else: be patient
        extra={"auth_secret_file": str(secret), "handshake_timeout": 60, "kv_lease_duration": 90},
    )


def large_blocks_pair(folder: Path) -> Setup:
    """Blocks of 128 tokens at prefill, of 32 at decode; only staging memory can be reached.

    Prefill's chunks can be spoiled: `Pair.spoil`.
    """
    return Setup(
        model("KVCONNECT_MODEL"),
        prefill=["--block-size", "128"],
        decode=["--block-size", "32"],
        extra={"transfer_mode": "staged", "staging_bytes": 16 << 20, "load_timeout": 15},
        policy="recompute",
        prefill_names={
            "kv_connector": "SpoilingConnector",
            "kv_connector_module_path": "spoiling",
        },
        env={"PYTHONPATH": str(HERE), SPOIL_FILE: str(folder / "spoil")},
    )


def recurrent_pair(folder: Path) -> Setup:
    """Attention beside a Mamba-2 mixer; its state moves whole, through staging memory.

    vLLM's CPU kernels of Mamba-2 fail on prompts of several chunks with a prefix cache ("align").
    """
    return Setup(
        model("KVCONNECT_STATE_MODEL"),
        both=["--no-enable-prefix-caching"],
        extra={"transfer_mode": "staged"},
    )


def quantizing_pair(folder: Path) -> Setup:
    """bf16 prefill, fp8 KV cache at decode: prefill gathers, converts and sends half the bytes."""
    return Setup(
        model("KVCONNECT_MODEL"),
        decode=["--kv-cache-dtype", "fp8"],
        both=["--dtype", "bfloat16", "--max-logprobs", "20"],
    )


def mooncake_pair(folder: Path) -> Setup:
    """Blocks of 32 tokens to 128 and TP 1 → 2, over Mooncake."""
    return reshaping("mooncake")


def ucx_pair(folder: Path) -> Setup:
    """The same over UCX."""
    return reshaping("ucx")


def reshaping(connector: str) -> Setup:
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        connector=connector,
        prefill=["--block-size", "32"],
        decode=["--block-size", "128", "--tensor-parallel-size", "2"],
        both=SHORT,
        # two ranks that spin leave little of two cores to anybody else: be patient
        extra={"handshake_timeout": 60, "kv_lease_duration": 90},
    )


def routed_pair(folder: Path) -> Setup:
    """Mooncake's transfers and contract, over TCP, under vLLM's own name, with a secret."""
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    return Setup(
        model("KVCONNECT_TP_MODEL"),
        both=SHORT,
        extra={
            "auth_secret_file": str(secret),
            "mooncake_protocol": "tcp",
            "kv_lease_duration": 10,
            "prefill_timeout": 10,
        },
        policy="recompute",
        names={"kv_connector": "MooncakeConnector", "kv_connector_module_path": "kvconnect.vllm"},
        env={"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(port)},
    )


def keeper(folder: Path) -> SoloSetup:
    """SmolLM2 with little memory for KV and more of disk, both kept over a restart."""
    return SoloSetup(
        model("KVCONNECT_MODEL"),
        {
            "cpu_bytes_to_use": 64 << 20,  # 10 chunks
            "disk_path": str(folder / "disk"),
            "disk_bytes": 1 << 30,
            "persist": True,
            "memory_path": str(folder / "memory"),
        },
        names={
            "kv_connector": "OffloadingConnector",
            "kv_connector_module_path": "kvconnect.vllm",
        },
    )


def crowded_keeper(folder: Path) -> SoloSetup:
    """TP 2, sliding windows, few blocks, and memory for fewer chunks than there are."""
    return SoloSetup(
        model("KVCONNECT_HMA_MODEL"),
        {"cpu_bytes_to_use": 24 << 20, "eviction_policy": "arc"},
        ["--tensor-parallel-size", "2", "--num-gpu-blocks-override", "40", *SHORT],
    )


def latent_keeper(folder: Path) -> SoloSetup:
    """TP 2 of a model whose KV is one latent vector a token, the same on both ranks (MLA)."""
    return SoloSetup(
        model("KVCONNECT_MLA_MODEL"),
        {"cpu_bytes_to_use": 16 << 20},
        ["--tensor-parallel-size", "2", "--dtype", "bfloat16", *SHORT],
    )


def sharers(folder: Path) -> SharersSetup:
    """Two engines with little memory, which read each other's memory and disk."""
    return SharersSetup(
        model("KVCONNECT_TP_MODEL"),
        {
            "cpu_bytes_to_use": 6 << 20,  # 11 chunks
            "disk_path": str(folder / "disk"),
            "disk_bytes": 64 << 20,
            "memory_path": str(folder / "memory"),
            "share": True,
            "write_policy": "write-back",
            "eviction_policy": "arc",
        },
        SHORT,
    )


def xpyd(folder: Path) -> XpydSetup:
    """Two prefill and two decode engines, one of TP 2, with sliding windows, behind a router."""
    return XpydSetup(
        model("KVCONNECT_HMA_MODEL"),
        prefill=[(), ()],
        decode=[(), ("--tensor-parallel-size", "2")],
        both=SHORT,
        # two ranks that spin leave little of two cores to anybody else: be patient
        extra={"handshake_timeout": 15, "kv_lease_duration": 90},
    )


def multi_pair(folder: Path) -> multi.MultiSetup:
    """KVConnectMulti[KVConnectNixl, KVConnectOffloading]; the tests say what it prefers."""
    return multi.ours(model("KVCONNECT_TP_MODEL"), folder)


def coexisting_pair(folder: Path) -> multi.MultiSetup:
    """Two prefill → decode children at both engines, which have them in another order."""
    return multi.coexisting(model("KVCONNECT_TP_MODEL"), folder)


def windowed_pair(folder: Path) -> multi.MultiSetup:
    """The chain of `multi_pair` with sliding windows, TP 1 → 2."""
    return multi.two_ranked(model("KVCONNECT_HMA_MODEL"), folder)


def in_tree_pair(folder: Path) -> multi.MultiSetup:
    """vLLM's own MultiConnector over the same."""
    return multi.in_tree(model("KVCONNECT_TP_MODEL"))


SETUPS = (
    pair,
    secret_pair,
    crowded_pair,
    identity_pair,
    hybrid_pair,
    hybrid_blocks_pair,
    pipeline_pair,
    small_blocks_pair,
    streaming_pair,
    large_blocks_pair,
    recurrent_pair,
    quantizing_pair,
    routed_pair,
    mooncake_pair,
    ucx_pair,
    keeper,
    crowded_keeper,
    xpyd,
    latent_keeper,
    sharers,
    multi_pair,
    coexisting_pair,
    windowed_pair,
    in_tree_pair,
)
ORDER = {setup.__name__: place for place, setup in enumerate(SETUPS)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.engine)
    places = iter(sorted(ours, key=lambda item: min(map(_place, item.fixturenames), default=99)))
    items[:] = [next(places) if HERE in item.path.parents else item for item in items]


def _place(fixture: str) -> int:
    return ORDER.get(fixture, 99)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair | Solo]]:
    """Gives the engines of a setup; ends those that ran before, if they were others'.

    The first engine of `pair` is started by its command line; all others are forked, which saves
    30 seconds each. So one of `pair` has another hash seed of Python's, and spawned processes.
    """
    current: dict[Callable, Pair | Solo] = {}
    nurseries: list[Nursery] = []
    with ExitStack() as session, ExitStack() as stack:

        def forking(*what) -> Process:
            if not nurseries:
                nurseries.append(session.enter_context(Nursery()))
            return nurseries[0].launch(*what)

        def one_by_command_line() -> Launch:
            ways = itertools.chain([launch], itertools.repeat(forking))
            return lambda *what: next(ways)(*what)

        def get(setup: Callable[[Path], Setup | SoloSetup]) -> Pair | Solo:
            if setup not in current:
                current.clear()
                stack.close()
                folder = tmp_path_factory.mktemp(setup.__name__)
                fleet = stack.enter_context(
                    Fleet(folder, one_by_command_line() if setup is pair else forking)
                )
                current[setup] = setup(folder).start(fleet)
            return current[setup]

        yield get


def _fixture(setup: Callable[[Path], Setup | SoloSetup]) -> object:
    @pytest.fixture(name=setup.__name__)
    def fixture(running: Callable[..., Pair | Solo]) -> Pair | Solo:
        return running(setup)

    return fixture


fixtures = [_fixture(setup) for setup in SETUPS]
(
    pair_fixture,
    secret_fixture,
    crowded_fixture,
    identity_fixture,
    hybrid_fixture,
    hybrid_blocks_fixture,
    pipeline_fixture,
    small_blocks_fixture,
    streaming_fixture,
    large_blocks_fixture,
    recurrent_fixture,
    quantizing_fixture,
    routed_fixture,
    mooncake_fixture,
    ucx_fixture,
    keeper_fixture,
    crowded_keeper_fixture,
    xpyd_fixture,
    latent_keeper_fixture,
    sharers_fixture,
    multi_fixture,
    coexisting_fixture,
    windowed_fixture,
    in_tree_fixture,
) = fixtures
