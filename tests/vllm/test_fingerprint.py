"""What engines of two vLLM and transformers versions must agree on, and what they need not."""

from types import SimpleNamespace

import msgspec
import pytest

from kvconnect.control import wire
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
    "rope in another order": config(text={"rope_parameters": dict(reversed(ROPE.items()))}),
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


@pytest.mark.parametrize("size", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_every_size_tells_models_apart(size):
    assert fingerprint(config(text={size: 7}), None)["sizes"] != REFERENCE["sizes"]


def test_a_window_tells_models_apart():
    windowed = fingerprint(config(text={"sliding_window": 64}), None)
    assert windowed["positions"] != REFERENCE["positions"]


def test_a_model_without_named_architectures_has_none():
    assert fingerprint(config(architectures=()), None)["architectures"] == ""
    unnamed = config()
    unnamed.model_config.hf_config.architectures = None
    assert fingerprint(unnamed, None)["architectures"] == ""


@pytest.mark.parametrize(("field", "other"), OTHER.items(), ids=OTHER)
def test_what_kv_depends_on_is_named(field, other):
    found = fingerprint(other, None)
    assert {name for name in found if found[name] != REFERENCE[name]} == {field}


def test_rope_as_older_configs_have_it_tells_models_apart():
    def old(theta, scaling=None):
        text = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling}
        return fingerprint(config(text=text), None)

    assert old(1e4) != old(5e5)
    assert old(1e4) != old(1e4, {"factor": 8.0})


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
