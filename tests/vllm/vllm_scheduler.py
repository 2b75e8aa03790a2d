"""vLLM's own scheduler with a connector of ours, and steps of workers that are not there."""

import functools
import os

import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvconnect.vllm.worker import RankMetadata

BLOCK = 16
MOST_TOKENS = 256
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@functools.cache
def model():
    path = os.environ["KVCONNECT_TP_MODEL"]
    return ModelConfig(model=path, dtype="float32", max_model_len=MOST_TOKENS)


class EngineCore:
    """The part of vLLM's engine core that decides when there is work, around its scheduler."""

    def __init__(self, connector="KVConnectNixl", num_blocks=40, shutdown_timeout=0, **extra):
        init_none_hash(sha256)
        self.answers = {}
        """What clients were answered, by request: kv_transfer_params."""
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
        cache.num_gpu_blocks = num_blocks
        cache.kv_cache_layout = "LBHNC"
        config = VllmConfig(
            model_config=model(),
            shutdown_timeout=shutdown_timeout,
            cache_config=cache,
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=256,
                max_model_len=MOST_TOKENS,
                is_encoder_decoder=False,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector=connector,
                kv_connector_module_path="kvconnect.vllm",
                kv_role="kv_both",
                kv_connector_extra_config=extra,
            ),
        )
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.connector = self.scheduler.get_kv_connector()
        for one in getattr(self.connector, "children", [self.connector]):
            if hasattr(one, "set_xfer_handshake_metadata_pp_aware"):
                one.set_xfer_handshake_metadata_pp_aware(
                    {(0, 0): RankMetadata("127.0.0.1", 7000, 7100, "i")}
                )
        self.step()

    @property
    def blocks_in_use(self):
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - pool.get_num_free_blocks() - 1

    def add(
        self, request_id, params=None, first=0, tokens=40, max_tokens=1, ids=None, cache_salt=None
    ):
        """``ids``: the prompt's tokens, where they are not those from ``first`` on."""
        request = Request(
            request_id=request_id,
            prompt_token_ids=ids or list(range(first, first + tokens)),
            cache_salt=cache_salt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        request.sampling_params.update_from_generation_config({}, 2)
        request.kv_transfer_params = params
        self.scheduler.add_request(request)
        return request

    def step(self, **told):
        """One step; ``told`` is what the workers say, as of KVConnectorOutput."""
        made = self.scheduler.schedule()
        scheduled = list(made.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=scheduled,
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=[[7] for _ in scheduled],
            kv_connector_output=KVConnectorOutput(**told) if told else None,
        )
        for answered in self.scheduler.update_from_output(made, output).values():
            self.answers |= {o.request_id: o.kv_transfer_params for o in answered.outputs}
        return made.kv_connector_metadata

    def lend(self, request_id, **asked):
        """Prefill a prompt whose blocks are lent from then on."""
        request = self.add(request_id, PREFILL, **asked)
        self.step()
        assert request.is_finished() and request_id in self.scheduler.requests
        return request
