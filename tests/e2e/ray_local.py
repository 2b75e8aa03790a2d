"""What replicas of ray_serve.py import: nothing but this."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class NothingToDownload(CallbackBase):
    """The model is here; or Ray starts a process for each replica, which imports vLLM, to look."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
