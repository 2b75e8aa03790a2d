"""What engines of two vLLM and transformers versions must agree on, and what they need not."""

import os
from types import SimpleNamespace

import checkpoints
import msgspec
import pytest
from vllm.engine.arg_utils import EngineArgs

from kvconnect.control import wire
from kvconnect.vllm import weights
from kvconnect.vllm.fingerprint import COMPUTED, fingerprint, of_model

ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
DUMMY = SimpleNamespace(load_format="dummy")  # the same weights everywhere


def config(
    model="/models/a", text=None, architectures=("LlamaForCausalLM",), load=DUMMY, **changes
):
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
        model_weights="",
        revision=None,
        quantization=None,
        hf_config=SimpleNamespace(architectures=list(architectures)),
        hf_text_config=SimpleNamespace(**fields | (text or {})),
    )
    for name, value in changes.items():
        setattr(model_config, name, value)
    return SimpleNamespace(model_config=model_config, load_config=load, speculative_config=None)


REFERENCE = fingerprint(config(), None)

SAME = {
    "another name": config(model="/elsewhere/b/"),
    "a revision, which a name has": config(revision="main"),
    "a field that another transformers adds": config(text={"new_in_6": True, "use_cache": False}),
    "rope told twice": config(text={"rope_theta": 10_000.0}),
    "rope in another order": config(text={"rope_parameters": dict(reversed(ROPE.items()))}),
}


@pytest.mark.parametrize("other", SAME.values(), ids=SAME)
def test_what_kv_does_not_depend_on_may_differ(other):
    assert fingerprint(other, None) == REFERENCE


OTHER = {
    "architectures": config(architectures=["MistralForCausalLM"]),
    "sizes": config(text={"num_hidden_layers": 3}),
    "positions": config(text={"rope_parameters": {**ROPE, "rope_theta": 5e5}}),
    "quantization": config(quantization="fp8"),
    "computation": config(text={"num_experts_per_tok": 1}),
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


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("rope", [LONGROPE, {"full_attention": LONGROPE, "sliding": ROPE}])
def test_factors_that_vllm_chooses_by_the_longest_prompt_tell_models_apart(rope):
    """The same Phi-3, served with ``--max-model-len`` 4096 and with 8192, has two rotations."""
    text = {"rope_parameters": rope}
    short, long, longer = (
        fingerprint(config(text=text, max_model_len=n), None) for n in (4096, 8192, 16384)
    )
    assert short["positions"] != long["positions"]
    assert long == longer


def test_rope_that_is_scaled_to_a_length_tells_models_apart_by_it():
    def reaching(most, rope):
        text = {"rope_parameters": rope, "max_position_embeddings": most}
        return fingerprint(config(text=text, max_model_len=64), None)

    assert reaching(2048, DYNAMIC) != reaching(4096, DYNAMIC)
    assert reaching(2048, ROPE) == reaching(4096, ROPE)


def test_rope_that_takes_no_factors_by_the_longest_prompt_may_serve_any():
    """``dynamic`` turns by its own lengths alone, also beside layers that say an original one."""
    rope = {"full_attention": DYNAMIC, "sliding": ROPE | {"original_max_position_embeddings": None}}
    of = [
        fingerprint(config(text={"rope_parameters": rope}, max_model_len=n), None) for n in (1, 9)
    ]
    assert of[0] == of[1]


def test_llama_4_that_scales_queries_by_position_is_another():
    """vLLM decides it by the longest prompt, and a generation config overrules that."""

    def llama4(most, said=None, overridden=None):
        options = {
            "max_model_len": most,
            "try_get_generation_config": lambda: dict(said or {}),
            "override_generation_config": overridden or {},
        }
        return fingerprint(config(text={"model_type": "llama4_text"}, **options), None)

    off, on = llama4(32_768), llama4(131_072)
    assert off["positions"] != on["positions"] and llama4(40_000) == on
    tuned = {"attn_temperature_tuning": True}
    assert llama4(4096, tuned) == on == llama4(4096, overridden=tuned)
    assert llama4(4096, tuned, {"attn_temperature_tuning": False}) == off


@pytest.mark.parametrize("field", COMPUTED)
def test_what_a_config_has_computed_otherwise_tells_models_apart(field):
    """Of ``--hf-overrides``, or of another config.json beside the same weights."""
    changed = fingerprint(config(text={field: 0.5}), None)
    assert {name for name in changed if changed[name] != REFERENCE[name]} == {"computation"}


def test_rope_as_older_configs_have_it_tells_models_apart():
    def old(theta, scaling=None):
        text = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling}
        return fingerprint(config(text=text), None)

    assert old(1e4) != old(5e5)
    assert old(1e4) != old(1e4, {"factor": 8.0})


# -- weights ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def engine_starts_later(monkeypatch):
    """Than the files of these tests are written."""
    monkeypatch.setattr(weights, "started_s", lambda: float("inf"))


def served(path, draft=None, **changes):
    """An engine that loads the files at ``path``, and of a draft model."""
    found = config(model=str(path), load=checkpoints.load_config(), **changes)
    if draft is not None:
        found.speculative_config = SimpleNamespace(
            method="eagle",
            draft_model_config=config(model=str(draft)).model_config,
            draft_load_config=None,
        )
    return found


def test_two_fine_tunes_in_folders_of_one_name_are_told_apart(tmp_path):
    """Only the last part of the path used to be compared: KV of the one served for the other."""
    one, other = tmp_path / "1" / "hf", tmp_path / "2" / "hf"
    checkpoints.write(one, {"q": 1, "k": 2})
    checkpoints.write(other, {"q": 1, "k": 3})
    ours, theirs = (fingerprint(served(path), None) for path in (one, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"weights"}


def test_one_model_at_two_paths_is_one(tmp_path):
    for name in ("a", "b"):
        checkpoints.write(tmp_path / name, {"q": 1})
    ours, theirs = (fingerprint(served(tmp_path / name), None) for name in ("a", "b"))
    assert ours == theirs


def test_model_id_stands_for_weights_of_both_sides_or_is_refused(tmp_path):
    for seed, name in enumerate("ab"):
        checkpoints.write(tmp_path / name, {"q": seed})
    a, b = (served(tmp_path / name, draft=tmp_path / name) for name in "ab")
    assert fingerprint(a, "llama") == fingerprint(b, "llama") != fingerprint(a, "other")
    assert fingerprint(a, "llama").keys() != fingerprint(a, None).keys()
    assert "weights" not in fingerprint(a, "llama")


def test_weights_that_are_not_known_are_like_no_others_and_say_what_to_do(tmp_path):
    far = config(
        model=str(tmp_path), model_weights="s3://bucket/latest", load=checkpoints.load_config()
    )
    one, again = fingerprint(far, None), fingerprint(far, None)
    assert one["weights"] != again["weights"]
    assert "set model_id on both engines (they are at s3://bucket/latest" in one["weights"]
    assert fingerprint(far, "llama") == fingerprint(far, "llama")


def test_a_long_reason_fits_the_wire():
    far = config(model_weights="s3://" + "x" * 900, load=checkpoints.load_config())
    assert len(fingerprint(far, None)["weights"]) <= 512


# -- speculation --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"])
def test_speculation_without_kv_is_no_difference(method):
    """n-gram speculation on decode alone used to have every transfer refused."""
    speculating = config()
    speculating.speculative_config = SimpleNamespace(method=method, draft_model_config=None)
    assert fingerprint(speculating, None) == REFERENCE


def test_a_draft_model_with_kv_is_a_difference_and_so_are_its_weights(tmp_path):
    for name, seed in {"model": 0, "draft": 1, "other": 2, "copy": 1}.items():
        checkpoints.write(tmp_path / name, {"q": seed})
    plain, draft, other, copy = (
        fingerprint(served(tmp_path / "model", draft=name and tmp_path / name), None)
        for name in (None, "draft", "other", "copy")
    )
    assert plain["speculation"] != draft["speculation"]
    differing = {name for name in draft if draft[name] != other[name]}
    assert differing == {"weights of the draft model"}
    assert draft == copy


def test_mtp_layers_are_in_the_model_s_own_files_and_count():
    plain, with_mtp = config(), config()
    text = SimpleNamespace(num_nextn_predict_layers=1)
    draft = SimpleNamespace(model="/models/a", hf_text_config=text)
    with_mtp.speculative_config = SimpleNamespace(method="mtp", draft_model_config=draft)
    ours, theirs = fingerprint(plain, None), fingerprint(with_mtp, None)
    assert {name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name)} == {
        "speculation"
    }


# -- the wire -----------------------------------------------------------------------------------


def test_a_long_field_fits_the_wire_and_still_differs():
    def scaled(last):
        factors = [*([1.5] * 300), last]
        rope = {**ROPE, "long_factor": factors}
        return fingerprint(config(text={"rope_parameters": rope}), None)

    welcome = wire.Welcome(version=wire.VERSION, proof=b"", fingerprint=scaled(1.0), body=b"")
    assert msgspec.convert(msgspec.to_builtins(welcome), wire.Welcome)
    assert wire.decode(wire.encode(welcome)) == welcome
    assert scaled(1.0) != scaled(2.0)


def test_a_model_without_an_engine_says_what_its_engine_says():
    """`kvconnect doctor --model` compares it with a running one."""
    model = os.environ["KVCONNECT_TP_MODEL"]
    engine = EngineArgs(model=model).create_engine_config()
    assert of_model(model, None) == fingerprint(engine, None)
    assert of_model(model, "ours")["model_id"] == "ours"
