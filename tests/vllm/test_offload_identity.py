"""What names stored KV, as taken from vLLM's configuration and requests."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, UniformTypeKVCacheSpecs

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.keys import Names
from kvconnect.vllm.offload.identity import cuts, identity
from kvconnect.vllm.offload.tracked import NO_LIMIT, Tracked

BLOCK = 16


def spec(block=BLOCK):
    return FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32)


def cut(groups=1, **options):
    config = parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")
    one = [SimpleNamespace(kv_cache_spec=spec()) for _ in range(groups)]
    return cuts(SimpleNamespace(kv_cache_groups=one), config)


class HfConfig:
    """As transformers' configs, which say everything in `to_dict`."""

    architectures = ("LlamaForCausalLM",)

    def __init__(self, commit=None, **fields):
        self.fields = fields
        self._commit_hash = commit

    def to_dict(self):
        return self.fields


def engine(method=None, cache=None, text=None, **changes):
    """A VllmConfig, with changes to its ModelConfig."""
    text = {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}} | (text or {})
    model = {
        "model": "somebody/a",
        "revision": None,
        "quantization": None,
        "dtype": torch.bfloat16,
        "hf_config": HfConfig(),
        "hf_text_config": SimpleNamespace(**text),
    }
    cache = {"cache_dtype": "auto", "prefix_caching_hash_algo": "sha256"} | (cache or {})
    return SimpleNamespace(
        model_config=SimpleNamespace(**model | changes),
        cache_config=SimpleNamespace(**cache),
        speculative_config=SimpleNamespace(method=method) if method else None,
    )


OTHERS = {
    "name": engine(model="somebody/b"),
    "revision": engine(revision="abc"),
    "commit": engine(hf_config=HfConfig("abc")),
    "anything in its config": engine(hf_config=HfConfig(attention_bias=True)),
    "rope": engine(text={"rope_parameters": {"rope_theta": 5e5}}),
    "size": engine(text={"hidden_size": 128}),
    "dtype": engine(dtype=torch.float16),
    "KV dtype": engine(cache={"cache_dtype": "fp8"}),
    "quantization": engine(quantization="awq"),
    "draft": engine("eagle"),
    "hash algorithm": engine(cache={"prefix_caching_hash_algo": "xxhash"}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_engine_s_kv_has_another_name(other):
    assert identity(other, cut()) != identity(engine(), cut())
    assert identity(engine(), cut()) == identity(engine(), cut())


def test_another_cut_or_seed_has_another_name(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    found = [identity(engine(), cut(), seed=seed) for seed in ("", "1", "2")]
    found += [identity(engine(), cut(block_size=2 * BLOCK)), identity(engine(), cut(groups=2))]
    for seed in ("3", "4"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(identity(engine(), cut()))
    assert len(set(map(repr, found))) == len(found)


def test_weights_that_were_written_anew_have_another_name(tmp_path):
    """A model that was trained on, in the same folder, used to be taken for what it was."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"0123")
    os.utime(weights, ns=(1, 1))
    before = identity(engine(model=str(tmp_path)), cut())
    (tmp_path / "README.md").write_text("no weights")
    assert identity(engine(model=str(tmp_path)), cut()) == before
    os.utime(weights, ns=(1, 2))
    later = identity(engine(model=str(tmp_path)), cut())
    weights.write_bytes(b"01234")
    os.utime(weights, ns=(1, 2))
    longer = identity(engine(model=str(tmp_path)), cut())
    alone = identity(engine(model=str(weights)), cut())
    weights.rename(tmp_path / "other.safetensors")
    renamed = identity(engine(model=str(tmp_path)), cut())
    assert len({repr(one) for one in (before, later, longer, alone, renamed)}) == 5


def test_layers_of_one_kind_are_cut_as_their_group_says():
    of_each = {"a": spec(), "b": replace(spec(), head_size=16)}
    group = SimpleNamespace(kv_cache_spec=UniformTypeKVCacheSpecs(BLOCK, of_each))
    config = parse({"cpu_bytes_to_use": 1 << 20}, OffloadConfig, "test")
    assert cuts(SimpleNamespace(kv_cache_groups=[group]), config) == cut()


def test_recurrent_state_is_refused():
    state = MambaSpec(block_size=BLOCK, shapes=((2, 2),), dtypes=(torch.float32,))
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=state)])
    config = parse({"cpu_bytes_to_use": 1 << 20}, OffloadConfig, "test")
    with pytest.raises(ConfigError, match="group 0 keeps MambaSpec state, which cannot be"):
        cuts(groups, config)


def test_what_cannot_be_cut_is_refused():
    assert cut(blocks_per_chunk=3) == cut(block_size=3 * BLOCK)
    with pytest.raises(ConfigError, match="block_size is 24, expected a multiple of the engine's"):
        cut(block_size=24)


# -- requests ------------------------------------------------------------------------------------


def request(**changes):
    fields = {
        "request_id": "r",
        "block_hashes": [bytes([n]) * 32 for n in range(4)],
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "kv_transfer_params": None,
    }
    return SimpleNamespace(**fields | changes)


def tracked(chunk=BLOCK, **changes):
    return Tracked(
        request(**changes), Names(identity(engine(), cut())), cut(block_size=chunk), BLOCK
    )


def picture(name, offset=0):
    return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset))


def adapter(name="n", path="p"):
    return SimpleNamespace(lora_name=name, lora_path=path)


REQUESTS = {
    "salt": {"cache_salt": "s"},
    "adapter": {"lora_request": adapter()},
    "adapter's name": {"lora_request": adapter(name="m")},
    "adapter's weights": {"lora_request": adapter(path="q")},
    "picture": {"mm_features": [picture("a")]},
    "another picture": {"mm_features": [picture("b")]},
    "elsewhere": {"mm_features": [picture("b", 3)]},
    "tokens": {"block_hashes": [b"x" * 32] * 4},
}


def test_requests_that_differ_share_nothing():
    found = [frozenset(tracked(**one).keys()[0]) for one in ({}, *REQUESTS.values())]
    assert len(frozenset().union(*found)) == sum(map(len, found))


def test_an_adapter_that_was_written_anew_has_another_name(tmp_path):
    weights = tmp_path / "adapter_model.safetensors"
    keys = []
    for time_ns in (1, 2):
        weights.write_bytes(b"0123")
        os.utime(weights, ns=(1, time_ns))
        keys.append(tracked(lora_request=adapter(path=str(tmp_path))).keys())
    assert keys[0] != keys[1]


def test_a_chunk_is_named_once_all_its_blocks_are_known_by_the_last():
    one = tracked(chunk=2 * BLOCK)
    assert len(one.keys()[0]) == 2
    one.request.block_hashes = [*one.request.block_hashes, b"y" * 32]
    assert len(one.keys()[0]) == 2
    first = one.keys()[0][0]
    one.request.block_hashes = [b"z" * 32, *one.request.block_hashes[1:3]]
    assert len(one.keys()[0]) == 1, "a session took back what it had said"
    assert one.keys()[0][0] == first, "the last block's hash chains those before it"


def test_a_session_that_says_something_else_has_other_keys():
    one = tracked()
    before = list(one.keys()[0])
    one.request.block_hashes = [*one.request.block_hashes[:2], b"y" * 32, b"z" * 32]
    assert one.keys()[0][:2] == before[:2]
    assert not set(one.keys()[0][2:]) & set(before)


def test_chunks_of_all_groups_are_in_the_order_in_which_they_end():
    names = Names(identity(engine(), cut(groups=2)))
    one = Tracked(request(), names, cut(groups=2), BLOCK)
    first, second = one.keys()
    assert one.in_order() == [key for pair in zip(first, second, strict=True) for key in pair]


@pytest.mark.parametrize("asked", [-1, "many", True, 1.5, [1]])
def test_a_limit_that_is_no_number_is_ignored(asked, caplog):
    params = {"max_offload_tokens": asked}
    assert tracked(kv_transfer_params=params).most_tokens == NO_LIMIT
    assert "it is ignored" in caplog.text


def test_a_limit_is_kept():
    assert tracked(kv_transfer_params={"max_offload_tokens": 0}).most_tokens == 0
    assert tracked(kv_transfer_params="odd").most_tokens == NO_LIMIT
    assert tracked().most_tokens == NO_LIMIT


def test_hashes_may_be_of_less_than_a_block():
    """As vLLM has them where groups have blocks of several sizes."""
    of_whole = tracked(block_hashes=[bytes([n]) * 32 for n in (1, 3)]).keys()
    names = Names(identity(engine(), cut()))
    assert Tracked(request(), names, cut(), BLOCK // 2).keys() == of_whole
