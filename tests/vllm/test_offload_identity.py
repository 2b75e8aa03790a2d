"""What names stored KV, as taken from vLLM's configuration and requests."""

from dataclasses import replace
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, UniformTypeKVCacheSpecs

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.keys import ChunkKeys
from kvconnect.vllm import weights
from kvconnect.vllm.offload.identity import group_configs, identity, kept_apart
from kvconnect.vllm.offload.request_chunks import NO_LIMIT, RequestChunks

BLOCK = 16


def spec(block=BLOCK):
    return FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32)


def chunking(groups=1, **options):
    config = parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")
    one = [SimpleNamespace(kv_cache_spec=spec()) for _ in range(groups)]
    return group_configs(SimpleNamespace(kv_cache_groups=one), config)


class HfConfig:
    """As transformers' configs, which say everything in `to_dict`."""

    architectures = ("LlamaForCausalLM",)

    def __init__(self, commit=None, **fields):
        self.fields = fields
        self._commit_hash = commit

    def to_dict(self):
        return self.fields


def engine(method=None, cache=None, text=None, load=None, **changes):
    """A VllmConfig, with changes to its ModelConfig."""
    draft = SimpleNamespace(model="somebody/a", hf_text_config=SimpleNamespace())
    text = {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}} | (text or {})
    model = {
        "model": "somebody/a",
        "model_weights": "",
        "revision": None,
        "quantization": None,
        "dtype": torch.bfloat16,
        "hf_config": HfConfig("c0"),
        "hf_text_config": SimpleNamespace(**text),
    }
    cache = {"cache_dtype": "auto", "prefix_caching_hash_algo": "sha256"} | (cache or {})
    return SimpleNamespace(
        model_config=SimpleNamespace(**model | changes),
        cache_config=SimpleNamespace(**cache),
        load_config=load or checkpoints.load_config(),
        speculative_config=SimpleNamespace(
            method=method, draft_model_config=draft, draft_load_config=None
        )
        if method
        else None,
    )


OTHERS = {
    "commit": engine(hf_config=HfConfig("abc")),
    "anything in its config": engine(hf_config=HfConfig("c0", attention_bias=True)),
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
    assert identity(other, chunking()) != identity(engine(), chunking())
    assert identity(engine(), chunking()) == identity(engine(), chunking())


def test_another_cut_or_seed_has_another_name(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    found = [identity(engine(), chunking(), seed=seed) for seed in ("", "1", "2")]
    found += [
        identity(engine(), chunking(block_size=2 * BLOCK)),
        identity(engine(), chunking(groups=2)),
    ]
    for seed in ("3", "4"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(identity(engine(), chunking()))
    assert len(set(map(repr, found))) == len(found)


def test_names_revisions_paths_and_speculation_without_kv_do_not_matter():
    others = [
        engine(model="somebody/b", revision="main"),
        engine(hf_config=HfConfig("c0", _name_or_path="/models/a")),
        engine("ngram"),
    ]
    for other in others:
        assert identity(other, chunking()) == identity(engine(), chunking())


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture
def started_later(monkeypatch):
    """An engine is started after the files of a test are written."""
    monkeypatch.setattr(weights, "started_s", lambda: float("inf"))


def test_weights_that_were_written_anew_have_another_name(tmp_path, started_later):
    """Even of equal size and time, as ``rsync -t`` and layers of images leave them."""
    path = checkpoints.write(tmp_path / "a", {"q": 1})
    before, stat = identity(engine(model=str(tmp_path / "a")), chunking()), path.stat()
    checkpoints.write(tmp_path / "b", {"q": 1})
    assert identity(engine(model=str(tmp_path / "b")), chunking()) == before, "another path"
    checkpoints.write(tmp_path / "a", {"q": 2})
    weights.os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(engine(model=str(tmp_path / "a")), chunking()).model != before.model


def test_weights_may_be_named(tmp_path):
    here, there = engine(model=str(tmp_path)), engine(model="/elsewhere")
    named = identity(here, chunking(), "llama")
    assert named == identity(there, chunking(), "llama") != identity(here, chunking(), "other")
    named_as_a_digest = identity(here, chunking(), identity(engine(), chunking()).model)
    assert named_as_a_digest != identity(engine(), chunking())


FAR = engine(model_weights="s3://bucket/latest")
BOTH = {"persist": True, "share": True, "memory_path": "/dev/shm/x"}


def options(**changes):
    return parse({"cpu_bytes_to_use": 1 << 20} | changes, OffloadConfig, "test")


def test_weights_that_are_not_known_are_neither_kept_nor_shared():
    """Two models at one address, one after the other, used to be one."""
    config, why_not = kept_apart(options(**BOTH), FAR)
    assert (config.persist, config.share, config.memory_path) == (False, False, None)
    assert "s3://bucket/latest" in why_not
    assert config.cpu_bytes_to_use == 1 << 20


def test_nothing_else_is_refused():
    for given, model in [
        (options(**BOTH), engine()),
        (options(**BOTH, model_id="llama"), FAR),
        (options(), FAR),
    ]:
        assert kept_apart(given, model) == (given, "")


def test_keys_of_weights_that_are_not_known_are_unlike_any_others():
    one, other = (identity(FAR, chunking(), unknown=name) for name in "ab")
    assert one.model == "a" and other.model == "b"
    assert identity(FAR, chunking()) == identity(FAR, chunking()), (
        "ranks of an engine have one arena"
    )


def test_layers_of_one_kind_are_cut_as_their_group_says():
    of_each = {"a": spec(), "b": replace(spec(), head_size=16)}
    group = SimpleNamespace(kv_cache_spec=UniformTypeKVCacheSpecs(BLOCK, of_each))
    config = parse({"cpu_bytes_to_use": 1 << 20}, OffloadConfig, "test")
    assert group_configs(SimpleNamespace(kv_cache_groups=[group]), config) == chunking()


def test_recurrent_state_is_refused():
    state = MambaSpec(block_size=BLOCK, shapes=((2, 2),), dtypes=(torch.float32,))
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=state)])
    config = parse({"cpu_bytes_to_use": 1 << 20}, OffloadConfig, "test")
    with pytest.raises(ConfigError, match="group 0 keeps MambaSpec state, which cannot be"):
        group_configs(groups, config)


def test_what_cannot_be_cut_is_refused():
    assert chunking(blocks_per_chunk=3) == chunking(block_size=3 * BLOCK)
    with pytest.raises(ConfigError, match="block_size is 24, expected a multiple of the engine's"):
        chunking(block_size=24)


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


def tracked(chunk=BLOCK, adapter=None, **changes):
    names = ChunkKeys(identity(engine(), chunking()))
    return RequestChunks(request(**changes), names, chunking(block_size=chunk), BLOCK, adapter)


def picture(name, offset=0):
    return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset))


REQUESTS = {
    "salt": {"cache_salt": "s"},
    "adapter": {"adapter": "its digest"},
    "another adapter": {"adapter": "another digest"},
    "picture": {"mm_features": [picture("a")]},
    "another picture": {"mm_features": [picture("b")]},
    "elsewhere": {"mm_features": [picture("b", 3)]},
    "tokens": {"block_hashes": [b"x" * 32] * 4},
}


def test_requests_that_differ_share_nothing():
    found = [frozenset(tracked(**one).keys()[0]) for one in ({}, *REQUESTS.values())]
    assert len(frozenset().union(*found)) == sum(map(len, found))


def test_requests_with_an_adapter_that_is_not_known_have_no_keys():
    one = tracked(adapter="")
    assert one.keys() == [[]] and one.in_order() == []


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
    names = ChunkKeys(identity(engine(), chunking(groups=2)))
    one = RequestChunks(request(), names, chunking(groups=2), BLOCK)
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
    names = ChunkKeys(identity(engine(), chunking()))
    assert RequestChunks(request(), names, chunking(), BLOCK // 2).keys() == of_whole
