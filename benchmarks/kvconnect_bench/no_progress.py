"""In-tree's NIXL without its progress thread, which vLLM 0.32 has no option for.

Each engine's thread of that kind spins. Nothing of it is needed where a transfer reads or writes
memory of the same host: the engine asks NIXL in every step whether it has ended.
"""

import functools


@functools.cache
def install() -> None:
    """Agents that in-tree's connectors make in this process have none; vLLM's plugin."""
    from vllm.distributed import nixl_utils

    made = nixl_utils.nixl_agent_config  # connectors import it by this name, once they are needed
    nixl_utils.nixl_agent_config = functools.partial(made, enable_prog_thread=False)
