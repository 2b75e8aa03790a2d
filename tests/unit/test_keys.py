"""Keys: everything that KV depends on makes another key, and nothing else does."""

import itertools
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.offload.keys import ChunkKeys, Context, Identity, Item, arena_fingerprint

ENGINE = Identity(
    model="llama",
    config="c0",
    rope="default 10000",
    dtype="bfloat16",
    kv_dtype="auto",
    quantization=None,
    speculative=None,
    block_tokens=16,
    chunk_blocks=1,
    hashing="sha256 0",
)
CHUNK = (b"\x01" * 32, 0, 64)


def key(engine=ENGINE, context=None, chunk=CHUNK):
    return ChunkKeys(engine).of(context or Context()).key(*chunk)


def changed(value):
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return (*value, ("more", "of it"))
    return f"{value}?"


@pytest.mark.parametrize("field", Identity.__struct_fields__)
def test_another_engine_has_other_keys_and_another_arena(field):
    other = msgspec.structs.replace(ENGINE, **{field: changed(getattr(ENGINE, field))})
    assert key(other) != key()
    assert arena_fingerprint(other, {}) != arena_fingerprint(ENGINE, {})


@pytest.mark.parametrize(
    "context",
    [
        Context(cache_salt=""),
        Context(cache_salt="tenant"),
        Context(lora="tenant"),
        Context(items=(Item("tenant", 3),)),
        Context(items=(Item("tenant", 4),)),
        Context(more=(("tenant", ""),)),
    ],
    ids=str,
)
def test_another_context_has_other_keys(context):
    others = [Context(), Context(cache_salt="other"), Context(items=(Item("other", 3),))]
    assert all(key(context=context) != key(context=other) for other in others)


@pytest.mark.parametrize("chunk", [(b"\x02" * 32, 0, 64), (CHUNK[0], 1, 64), (CHUNK[0], 0, 128)])
def test_another_chunk_has_another_key(chunk):
    assert key(chunk=chunk) != key()


def test_a_picture_behind_the_chunk_does_not_matter_to_it():
    inside, behind = Item("cat", 63), Item("cat", 64)
    assert key(context=Context(items=(behind,))) == key()
    assert key(context=Context(items=(inside,))) != key()


def test_items_may_come_in_any_order():
    items = (Item("a", 1), Item("b", 1), Item("a", 5))
    found = {key(context=Context(items=order)) for order in itertools.permutations(items)}
    assert len(found) == 1


texts = st.one_of(st.none(), st.text(max_size=3))


@given(st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=8, unique=True))
def test_no_two_ways_to_cut_the_same_text_collide(parts):
    found = set()
    for salt, lora, dtype in parts:
        engine = msgspec.structs.replace(ENGINE, dtype=dtype)
        found.add(key(engine, Context(cache_salt=salt, lora=lora)))
    assert len(found) == len(parts)


@pytest.mark.parametrize("field", ["tp rank", "layout", "format"])
def test_another_shard_has_another_arena(field):
    shard = {"tp rank": "0", "layout": "dense", "format": "f"}
    print_of = arena_fingerprint(ENGINE, shard)
    assert arena_fingerprint(ENGINE, shard | {field: "1"}) != print_of
    assert arena_fingerprint(ENGINE, dict(reversed(shard.items()))) == print_of


@pytest.mark.slow
def test_another_process_finds_the_same_key():
    """They are looked up after a restart: no part may depend on the process."""
    code = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
    code += "from test_keys import *; print(key(context=Context(lora='x')).hex())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert bytes.fromhex(shown.stdout.strip()) == key(context=Context(lora="x"))


def test_the_format_has_not_changed_by_accident():
    """Persisted content is found by these: if this fails, raise `keys.VERSION`."""
    assert key().hex() == "6041417cb25036f69c8ecd605dcbf5a5d35aff0f1272b6d1dd83a1a52b5861ae"
