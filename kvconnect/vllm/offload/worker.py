"""The worker's half of the offloading connector: jobs in, answers out, on a thread of its own.

Memory that cannot be had, and a folder that cannot be used, are errors of the configuration, which
end the start. What fails later is a miss, or KV that is not kept.
"""

import functools
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvconnect.errors import ConfigError, StoreError
from kvconnect.loop import Fence
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.jobs import Fill, JobDone, Save
from kvconnect.offload.keys import arena_fingerprint
from kvconnect.offload.store.arena import Arena
from kvconnect.offload.store.numa import wanted
from kvconnect.offload.store.slot_layout import SlotLayout
from kvconnect.ops import Kernels
from kvconnect.vllm.adapter_reports import worker_adapters
from kvconnect.vllm.engine import kernels_for, this_rank, use_device
from kvconnect.vllm.layout import TpRank, describe
from kvconnect.vllm.offload.copies import gather_over_tp, open_copy
from kvconnect.vllm.offload.identity import group_configs, identity
from kvconnect.vllm.offload.loads import RunningLoads
from kvconnect.vllm.offload.messages import StepJobs, StoreHandshake, WorkerResults
from kvconnect.vllm.offload.opening import OpenStore, remove_unused_arenas

if TYPE_CHECKING:
    from kvconnect.offload.store.pinning import Pinning

logger = logging.getLogger(f"vllm.{__name__}")

GIB = 1 << 30


class OffloadWorker:
    """Made at construction of the connector; works from `register` on."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: OffloadConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._group_configs = group_configs(kv_cache_config, config)
        self._device: torch.device | None = None
        self._kernels: Kernels | None = None
        self._store: OpenStore | None = None
        self._found: StoreHandshake | None = None
        self._begun: StepJobs | None = None
        self._saves: list[Save] = []  # of the step that runs
        self._loads = RunningLoads()
        self._done = WorkerResults()
        self._rank = 0
        self._adapters = worker_adapters(vllm_config)
        self._counts: Counter[str] = Counter()
        self.answered: list[tuple[JobDone, float]] = []
        """The ends of all jobs, with their times, since the last but one `collect`."""

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Describe the caches, open memory and disk, start the thread."""
        rank = this_rank()
        self._rank = rank.index
        shard = describe(
            kv_caches, self._kv_cache_config, self._vllm_config, TpRank(rank.tp_rank, rank.tp_size)
        )
        self._device = next(iter(kv_caches.values())).device
        check_share(self._config, self._device)
        kernels = self._kernels = kernels_for(self._device)
        slot_layouts = [
            SlotLayout(shard, index, config.chunk_blocks, kernels)
            for index, config in enumerate(self._group_configs)
        ]
        formats = {f"format {index}": one.format for index, one in enumerate(slot_layouts)}

        def fingerprint_of(index: int) -> bytes:
            parts = {"rank": f"{index} of {rank.count}"} | formats
            found = identity(self._vllm_config, self._group_configs, self._config.model_id)
            return arena_fingerprint(found, parts)

        try:
            store = open_copy(
                *(self._config, rank, fingerprint_of, slot_layouts, self._pin, gather_over_tp),
                nodes=wanted(pci_address(self._device)),
            )
        except StoreError as e:
            raise ConfigError(
                f"KVConnectOffloading cannot store KV on rank {rank.index}: {e}"
            ) from e
        store.runner.start(use_device(self._device))
        self.serve(store)
        lead, stride = store.lead, store.memory.spec.stride
        self._introduce(rank.index, StoreHandshake(lead.slots, lead.disk_slots, *lead.keys))
        logger.info(
            "kvconnect: rank %d of %d %s %d chunks (%.2f GiB; all ranks together %.2f GiB) in "
            "memory, %d on disk; found %d and %d from before",
            *(rank.index, rank.count, "stores" if store.stores else "reads another's"),
            *(lead.slots, lead.slots * stride / GIB, self._config.cpu_bytes_to_use / GIB),
            lead.disk_slots,
            *(len(keys) for keys in lead.keys),
        )

    def serve(self, store: OpenStore) -> None:
        """Carry out jobs on ``store`` from now on."""
        self._store = store

    def get_handshake_metadata(self) -> StoreHandshake | None:
        """What this rank can hold; None before `register`."""
        return self._found

    def begin_step(self, work: StepJobs) -> None:
        """Start a step's jobs, before its forward; its saves wait for `forward_is_done`."""
        if work is self._begun:
            return
        if self._begun is None and not self._rank:  # by now every rank has opened its own
            threading.Thread(target=remove_unused_arenas, args=[self._config], daemon=True).start()
        self._begun = work
        self._adapters.bound(work.step)
        assert self._store is not None, "a step before the caches were registered"
        self._store.engine_runs()
        self.forward_is_done()  # of the step before, where vLLM did not say so
        for request_id, loading in work.loads.items():
            self._loads.begin(request_id, loading.fills, loading.problem)
        if work.jobs:
            self._store.runner.put(work.jobs, self._fence())
        self._saves += work.saves

    def forward_is_done(self) -> None:
        """The step's KV is computed, or will be by what the device has been given. Idempotent."""
        if self._saves and self._store is not None:
            self._store.runner.put(self._saves, self._fence())
            self._saves = []

    def collect(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended here, and those of them that failed."""
        if self._store is not None:
            report = self._store.runner.take()
            self.answered = [(one, report.ended_s[one.id]) for one in report.done]
            for done in report.done:
                self._answer(done.id, done.error)
            self._done.lost += report.lost
            self._done.gained.update(report.gained)
            self._done.gone.update(report.gone)
            self._counts.update(report.counts)
        return self._loads.take()

    def fill(self, fills: Sequence[Fill]) -> None:
        """Carry out spares of the scheduler's; `answered` says when each has ended."""
        assert self._store is not None
        self._store.runner.put(fills, self._fence())

    def decline(self, fills: Sequence[Fill]) -> None:
        """Answer spares that are not wanted."""
        self._done.answers |= dict.fromkeys((fill.number for fill in fills), (1, 0))
        self._done.declined.update(fill.number for fill in fills)

    def take_done(self) -> WorkerResults | None:
        """For the scheduler: what was done since the last call; None if nothing."""
        self._done.adapters = self._adapters.take(self._rank)
        if not any(vars(self._done).values()):  # as after most steps
            return None
        done, self._done = self._done, WorkerResults()
        return done

    def take_stats(self) -> dict[str, int] | None:
        """What was counted since the last call; None if nothing."""
        counts, self._counts = self._counts, Counter()
        return {name: n for name, n in counts.items() if n} or None

    def rest(self) -> None:
        """Wait until no block is read or written any more; raises RuntimeError if that takes long.

        The engine has paused, and the device has computed what it was given.
        """
        self.forward_is_done()
        if self._store is not None and not self._store.runner.rest():
            raise RuntimeError("KV is still being stored or loaded; the engine cannot go to sleep")

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        if self._store is not None:
            self._store.close()

    def _introduce(self, rank: int, found: StoreHandshake) -> None:
        """Twice: in-tree MultiConnector gives all its children the handshake of the first."""
        self._found = found
        self._done.found[rank] = found

    def _pin(self, memory: Arena, to_write: bool) -> "Pinning | None":
        """Make host memory one that the device's kernels can use; raises StoreError."""
        if self._device is None or self._device.type != "cuda":
            return None
        from kvconnect.offload.store.pinning import Pinning
        from kvconnect.ops.cuda import CudaKernels

        kernels = self._kernels
        assert isinstance(kernels, CudaKernels)
        content = memory.backing.bytes
        register = functools.partial(kernels.register, read_only=not to_write)
        pinning = Pinning(content.ctypes.data, content.nbytes, register, kernels.unregister)
        pinning.start()
        return pinning

    def _answer(self, number: int, error: str) -> None:
        self._done.answers[number] = 1, int(bool(error))
        self._loads.done(number, error)

    def _fence(self) -> Fence | None:
        """On a device, steps may still run that write what is to be read, or the reverse."""
        device = self._device
        if device is None or device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        computed: Fence = event.query
        return computed


def check_share(config: OffloadConfig, device: torch.device) -> None:
    """Raise ConfigError where other engines' memory cannot be read."""
    if config.share and device.type != "cpu":
        raise ConfigError(
            f"share is true on a {device.type} device, which cannot read the memory of other "
            "engines; leave share out"
        )


def pci_address(device: torch.device) -> str | None:
    """As sysfs names it; None of the CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
