"""Schedulers' halves of engines that are not there, for tests of what they make of requests."""

import time
from types import SimpleNamespace

from vllm.v1.request import RequestStatus

from kvconnect.vllm.scheduler import Scheduler
from kvconnect.vllm.worker import RankMetadata

BLOCK = 16


class Request:
    """The attributes of a vLLM request that are used."""

    def __init__(self, request_id, params, tokens=40):
        self.request_id = request_id
        self.kv_transfer_params = None if params is None else dict(params)
        self.prompt_token_ids = list(range(tokens))
        self._all_token_ids = list(range(tokens))
        self.num_prompt_tokens = self.num_computed_tokens = tokens
        self.prompt_embeds = self.lora_request = self.mm_features = self.cache_salt = None
        self.max_tokens = 16
        self.status = RequestStatus.WAITING

    def get_skip_reading_prefix_cache(self):
        return False

    def is_finished(self):
        return RequestStatus.is_finished(self.status)


class Block:
    block_hash, is_null = None, False

    def __init__(self, block_id):
        self.block_id = block_id


class Engine:
    """The scheduler's half of an engine, with one connector's options and contract."""

    def __init__(
        self,
        engine_id,
        role,
        config,
        contract,
        mamba=False,
        address=("127.0.0.1", 7000),
        lora=False,
        spec=None,
        drafts=None,
        num_blocks=1000,
    ):
        """``spec``: of the KV cache group, one of vLLM's; None for what has a block size alone."""
        parallel = SimpleNamespace(
            local_engines_only=False,
            data_parallel_index=0,
            data_parallel_rank_local=0,
            data_parallel_size=1,
            data_parallel_size_local=1,
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            pipeline_parallel_size=1,
            world_size=1,
        )
        spec = spec or SimpleNamespace(block_size=BLOCK)
        self.scheduler = Scheduler(
            SimpleNamespace(
                kv_transfer_config=SimpleNamespace(engine_id=engine_id, kv_role=role),
                parallel_config=parallel,
                scheduler_config=SimpleNamespace(
                    async_scheduling=False,
                    max_num_batched_tokens=2048,
                    long_prefill_token_threshold=0,
                ),
                model_config=SimpleNamespace(max_model_len=2048),
                lora_config=object() if lora else None,
                speculative_config=drafts,
            ),
            SimpleNamespace(
                kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])],
                transfer_group_ids=(0,),
                has_mamba_layers=mamba,
                num_blocks=num_blocks,
            ),
            config,
            contract,
        )
        self.scheduler.set_xfer_handshake_metadata({(0, 0): RankMetadata(*address, 7777, "k")})
        self.scheduler.take_orders()

    def arrives(self, params, request_id="r", **fields):
        request = Request(request_id, params)
        vars(request).update(fields)
        self.scheduler.on_new_request(request)
        return request

    def finishes(self, request, status=RequestStatus.FINISHED_LENGTH_CAPPED):
        request.status = status
        return self.scheduler.request_finished(request, ([1, 2, 3],))

    def steps(self, kinds):
        """Steps until there are orders, of these kinds."""
        until = time.monotonic() + 60
        while not (orders := self.scheduler.take_orders()):
            assert time.monotonic() < until
            time.sleep(0.002)
        assert [type(order) for order in orders] == kinds
        return orders
