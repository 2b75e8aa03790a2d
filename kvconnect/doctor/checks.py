"""All checks of ``kvconnect doctor``, in the order in which they are told."""

import importlib
import resource
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvconnect.config import NixlConfig, PeerConfig, read_secret
from kvconnect.control.wire import Address
from kvconnect.doctor import host, network, options, peer, software, speed
from kvconnect.doctor.finding import Check, Finding
from kvconnect.doctor.inspected import InspectedEngine
from kvconnect.doctor.link import LinkJob
from kvconnect.doctor.options import Explained
from kvconnect.errors import ConfigError

RDMA_BYTES = 1 << 30  # that a rank registers at least, where its KV cache is read directly


class Wanted(NamedTuple):
    """What is to be checked."""

    explained: Explained
    explicit: bool
    """Whether somebody gave that configuration."""
    peers: Sequence[Address]
    model: str | None
    expected: float | None
    """GB/s."""


def checks(wanted: Wanted, environ: Mapping[str, str], root: Path = host.ROOT) -> dict[str, Check]:
    """By name. Each reads what it is about when it runs."""
    explained, cards = wanted.explained, len(host.gpus(root))
    config = explained.peer or NixlConfig()
    transport, transport_options = config.chosen_transport("cuda" if cards else "cpu")
    registered = config.staging_bytes + (RDMA_BYTES if config.transfer_mode != "staged" else 0)
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS}
    job = LinkJob(transport, dict(transport_options), network.own_address(environ))
    found: dict[str, Check] = {
        "vLLM": software.vllm,
        "CUDA": partial(software.cuda, cards, software.driver(root), _torch),
        "kernels": partial(software.kernels, cards),
        "libraries": partial(software.libraries, transport, cards),
        "RDMA": partial(host.rdma, root),
        "GPU memory by RDMA": partial(host.gpu_direct, root),
        "memlock": partial(host.memlock, limits["RLIMIT_MEMLOCK"][0], registered, root),
        "open files": partial(host.files, limits["RLIMIT_NOFILE"][1]),
        "huge pages": partial(host.huge_pages, root),
        "NUMA": partial(host.nodes, root),
        host.SHM: partial(host.shared_memory, root),
        "memory": partial(host.memory, explained.host_bytes + config.staging_bytes, root),
        "host": partial(network.advertised, environ),
        "ports": partial(network.ports, explained.transfer, environ),
        "expandable_segments": partial(options.allocator, cards, config.transfer_mode, environ),
        "hash seed": partial(options.hash_seed, explained.configs, environ),
        "load failures": partial(options.load_failures, explained.transfer, explained.configs),
        "secret": partial(options.secret, config, environ),
        "configuration": lambda: explained.findings if wanted.explicit else (),
        "this host": partial(speed.loopback, job, wanted.expected),
    }
    if explained.configs and not explained.peer:  # nothing but offloading
        for name in OF_HAND_OVERS:
            del found[name]
    engines: list[InspectedEngine] = []
    for address in wanted.peers:
        found[f"peer {address}"] = partial(_peer, address, config, wanted, engines)
    if len(wanted.peers) > 1:
        found["pair"] = lambda: peer.both(engines) if len(engines) > 1 else ()
    return found


LIMITS = "RLIMIT_MEMLOCK", "RLIMIT_NOFILE"
OF_HAND_OVERS = (
    "libraries",
    "RDMA",
    "GPU memory by RDMA",
    "memlock",
    "host",
    "ports",
    "expandable_segments",
    "secret",
    "this host",
)


def _torch() -> Any:
    return importlib.import_module("torch")


def _peer(
    address: Address, config: PeerConfig, wanted: Wanted, engines: list[InspectedEngine]
) -> Iterator[Finding]:
    secret = read_secret(config.auth_secret_file) or b""
    ours = own_fingerprint(wanted.model, config.model_id)
    yield from peer.look(address, secret, config, ours, wanted.expected, engines)


def own_fingerprint(model: str | None, model_id: str | None) -> Mapping[str, str]:
    """What an engine of ``model`` would say, as far as it is known without one."""
    if model is None:
        return {"model_id": model_id} if model_id else {}
    try:
        from kvconnect.vllm.fingerprint import of_model

        return of_model(model, model_id)
    except ImportError as e:
        raise ConfigError(f"--model needs vLLM, which is not here ({e}); leave it out") from e
