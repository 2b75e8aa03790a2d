"""What any worker's half of ours asks of the engine that it is part of.

Which rank it is, whether the engine's parallelism is one that our connectors handle, and kernels
for the device that its caches are on. Knows no connector and no transport, so that each connector
imports this and not another connector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvconnect.errors import ConfigError
from kvconnect.ops import Kernels, load

STAGING_CTAS = 8  # of a launch: more than a NIC takes, and most of the GPU stays with the model


@dataclass(frozen=True)
class Rank:
    """This worker among those of its engine."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int

    @property
    def index(self) -> int:
        """Its place among all ranks: stage by stage, and in a stage by tensor-parallel rank."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def count(self) -> int:
        """How many ranks the engine has."""
        return self.pp_size * self.tp_size


def this_rank() -> Rank:
    """From vLLM's process groups; a single rank where there are none (tools, tests)."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return Rank(tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def kernels_for(device: torch.device) -> Kernels:
    """Kernels for caches on ``device``; raises ConfigError where there are none."""
    if device.type == "cuda":
        return load("cuda", index=device.index or 0, max_ctas=STAGING_CTAS)
    if device.type == "cpu":
        return load("cpu")
    raise ConfigError(f"there are no gather kernels for {device.type} devices")


def check_parallelism(parallel: Any) -> None:
    """Raise ConfigError for a parallelism that no connector of ours handles."""
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise ConfigError(f"{name} is {size}, expected 1: KV split by context is not handled")


def use_device(device: torch.device) -> Callable[[], None]:
    """What a thread of ours does first, so that its calls make no context on another GPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.set_device(device)
    return lambda: None
