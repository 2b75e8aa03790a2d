"""What engines of two vLLM and transformers versions must agree on, and what they need not."""

from types import SimpleNamespace

import msgspec
import pytest

from kvconnect import wire
from kvconnect.vllm.fingerprint import fingerprint

ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}


def config(model="/models/a", text=None, architectures=("LlamaForCausalLM",), **changes):
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "rope_parameters": ROPE,
        "sliding_window": None,
    }
    model_config = SimpleNamespace(
        model=model,
        revision=None,
        quantization=None,
        hf_config=SimpleNamespace(architectures=list(architectures)),
        hf_text_config=SimpleNamespace(**fields | (text or {})),
    )
    for name, value in changes.items():
        setattr(model_config, name, value)
    return SimpleNamespace(model_config=model_config, speculative_config=None)


REFERENCE = fingerprint(config(), None)

SAME = {
    "the model at another path": config(model="/elsewhere/a/"),
    "a field that another transformers adds": config(text={"new_in_6": True, "use_cache": False}),
    "rope told twice": config(text={"rope_theta": 10_000.0}),
}


@pytest.mark.parametrize("other", SAME.values(), ids=SAME)
def test_what_kv_does_not_depend_on_may_differ(other):
    assert fingerprint(other, None) == REFERENCE


OTHER = {
    "model": config(model="/models/b"),
    "revision": config(revision="abc"),
    "architectures": config(architectures=["MistralForCausalLM"]),
    "sizes": config(text={"num_hidden_layers": 3}),
    "positions": config(text={"rope_parameters": {**ROPE, "rope_theta": 5e5}}),
    "quantization": config(quantization="fp8"),
}


@pytest.mark.parametrize(("field", "other"), OTHER.items(), ids=OTHER)
def test_what_kv_depends_on_is_named(field, other):
    found = fingerprint(other, None)
    assert {name for name in found if found[name] != REFERENCE[name]} == {field}


def test_rope_as_older_configs_have_it_tells_models_apart():
    def old(theta):
        return fingerprint(config(text={"rope_parameters": None, "rope_theta": theta}), None)

    assert old(1e4) != old(5e5)


def test_model_id_names_a_model_whose_paths_differ():
    ours, theirs = (fingerprint(config(model=p), "llama") for p in ("/a/snapshot1", "/b/other"))
    assert ours == theirs


def test_a_long_field_fits_the_wire_and_still_differs():
    def scaled(last):
        factors = [*([1.5] * 300), last]
        rope = {**ROPE, "long_factor": factors}
        return fingerprint(config(text={"rope_parameters": rope}), None)

    welcome = wire.Welcome(fingerprint=scaled(1.0), body=b"")
    assert msgspec.convert(msgspec.to_builtins(welcome), wire.Welcome)
    assert wire.decode(wire.encode(welcome)) == welcome
    assert scaled(1.0) != scaled(2.0)
