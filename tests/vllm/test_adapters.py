"""Which weights an adapter's name stands for: as the workers loaded them, never by its name."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from halves import Engine
from safetensors.numpy import save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from kvconnect.config import NixlConfig
from kvconnect.orders import Fetch, Release, RenewLease
from kvconnect.vllm import adapters as module
from kvconnect.vllm.adapter_reports import (
    AdapterReport,
    Loaded,
    merged,
    scheduler_adapters,
    worker_adapters,
)
from kvconnect.vllm.adapters import Adapters, LoadedAdapters, digest_of, note
from kvconnect.vllm.protocol import RouterProtocol


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """In which nothing was loaded yet."""
    monkeypatch.setattr(module, "loaded_here", {})
    monkeypatch.setattr(module, "notes", 0)


# -- what a worker notes: vLLM's own loading of files ---------------------------------------------


def write(folder, seed, scale=1.0, alpha=8, target="q_proj"):
    """An adapter as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed)
    name = f"base_model.model.model.layers.0.self_attn.{target}"
    tensors = {
        f"{name}.lora_A.weight": values.random((8, 32), np.float32),
        f"{name}.lora_B.weight": values.random((32, 8), np.float32) * np.float32(scale),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": alpha, "target_modules": [target], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Registry(dict):
    def touch(self, key):
        """As vLLM's, which then is the last to go."""


class Manager(LRUCacheLoRAModelManager):
    """vLLM's, without a model: what it does with one is not looked at."""

    def __init__(self):
        self.registered = Registry()

    @property
    def _registered_adapters(self):
        return self.registered

    def _add_adapter(self, lora):
        self.registered[lora.id] = lora

    def remove_adapter(self, adapter_id):
        return self.registered.pop(adapter_id, None) is not None


class Worker:
    """What vLLM's worker does to load an adapter, and what it tells us."""

    def __init__(self, rank=0):
        self.noted = LoadedAdapters()
        self.manager = Manager()
        self.rank = rank

    def load(self, number, folder):
        helper = PEFTHelper.from_local_dir(str(folder), None)
        model = LoRAModel.from_local_checkpoint(
            str(folder), {"q_proj", "k_proj"}, helper, lora_model_id=number, device="cpu"
        )
        self.manager.remove_adapter(number)
        return self.manager.add_adapter(model)

    def digest(self, number):
        return self.noted.take(self.rank).loaded[number][self.rank].digest


def test_a_worker_notes_what_vllm_loaded(tmp_path):
    worker = Worker()
    assert worker.load(1, write(tmp_path / "a", 1)) and worker.load(2, write(tmp_path / "b/a", 2))
    worker.noted.bound(5)
    report = worker.noted.take(0)
    assert report.step == 5 and report.loaded.keys() == {1, 2}
    assert report.loaded[1][0].digest != report.loaded[2][0].digest
    assert worker.noted.take(0) == AdapterReport(5), "each is told once"


def test_copies_are_the_same_and_what_they_are_scaled_by_counts(tmp_path):
    worker = Worker()
    found = []
    for n, one in enumerate([{}, {}, {"scale": 2}, {"alpha": 16}, {"target": "k_proj"}], 1):
        worker.load(n, write(tmp_path / str(n), 1, **one))
        found.append(worker.digest(n))
    assert found[0] == found[1] and len(set(found)) == 4


def test_files_that_were_written_anew_after_they_were_loaded_change_nothing(tmp_path):
    """The digest used to be taken of files when a request came: of what nobody had loaded."""
    worker = Worker()
    worker.load(1, write(tmp_path, 1))
    write(tmp_path, 2)
    before = worker.digest(1)
    worker.load(2, write(tmp_path, 2))
    assert worker.digest(2) != before
    worker.load(1, tmp_path)  # in place
    report = worker.noted.take(0)
    assert report.loaded[1][0] != Loaded(before, 0) and report.loaded[1][0].changes == 1


def test_what_could_not_be_loaded_leaves_what_was(tmp_path):
    worker = Worker()
    worker.load(1, write(tmp_path / "a", 1))
    before = worker.digest(1)
    with pytest.raises(ValueError, match="expected target modules"):
        worker.load(1, write(tmp_path / "b", 2, target="unexpected"))
    LoRAModel.from_local_checkpoint(  # made, but never added
        str(write(tmp_path / "c", 3)),
        {"q_proj"},
        PEFTHelper.from_local_dir(str(tmp_path / "c"), None),
        lora_model_id=1,
        device="cpu",
    )
    assert worker.noted.take(0) == AdapterReport(0)
    worker.load(1, tmp_path / "a")
    assert worker.noted.take(0).loaded[1][0] == Loaded(before, 0)


def test_an_adapter_that_was_there_already_stays_what_it_was(tmp_path):
    worker = Worker()
    worker.load(1, write(tmp_path, 1))
    before = worker.digest(1)
    assert not worker.manager.add_adapter(LoRAModel(1, 8, {}))
    assert worker.noted.take(0) == AdapterReport(0) and before


def test_an_adapter_that_came_in_another_way_is_not_known():
    worker = Worker()
    worker.manager.add_adapter(LoRAModel(1, 8, {}))
    assert worker.digest(1) == ""


def test_each_half_of_a_process_is_told(tmp_path):
    """A chain has several connectors."""
    one, other = Worker(), Worker()
    one.load(1, write(tmp_path, 1))
    assert one.digest(1) == other.digest(1) != ""


def test_engines_without_adapters_are_left_alone():
    none = SimpleNamespace(lora_config=None)
    asked, noted = scheduler_adapters(none), worker_adapters(none)
    noted.bound(asked.next_step())
    assert noted.take(0) is None
    asked.received(None)
    asked.arrived(request(0))
    asked.cached(request(0), 16)
    assert not asked.undecided(request(0)) and not asked.mixed(request(0))
    assert asked.begin(request(0)) is asked.digest(request(0)) is None
    assert asked.digest(request(1)) == ""  # nobody looked which weights it has
    asked.ended("r")


def test_engines_with_adapters_are_not():
    some = SimpleNamespace(lora_config=object(), parallel_config=SimpleNamespace(world_size=2))
    assert isinstance(scheduler_adapters(some), Adapters)
    assert isinstance(worker_adapters(some), LoadedAdapters)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"]}, {"enable_tower_connector_lora": True}]
)
def test_an_adapter_that_is_applied_to_other_modules_is_another(options):
    """``--lora-target-modules`` on one engine: the same adapter computes other KV there."""

    def digest(**options):
        lora = SimpleNamespace(**{"target_modules": None} | options)
        parallel = SimpleNamespace(world_size=1)
        adapters = scheduler_adapters(SimpleNamespace(lora_config=lora, parallel_config=parallel))
        adapters.received(AdapterReport(adapters.next_step(), {1: {0: Loaded("x", 0)}}))
        adapters.arrived(asked := request())
        return adapters.begin(asked)

    assert digest() != digest(**options)
    assert digest(target_modules=["a", "b"]) == digest(target_modules=["b", "a"])


def test_pages_of_a_large_tensor_are_read_to_its_end():
    helper = SimpleNamespace(r=8)
    whole = torch.zeros(4 << 20, dtype=torch.bfloat16)
    found = []
    for place in (None, 0, -1):
        changed = whole.clone()
        if place is not None:
            changed[place] = 1
        found.append(digest_of({"x": changed}, helper))
    assert len(set(found)) == 3


# -- what a scheduler makes of it ------------------------------------------------------------------


def request(number=1, request_id="r", name="a", path="/a", inplace=False):
    lora = LoRARequest(name, number, path, load_inplace=inplace) if number else None
    return SimpleNamespace(request_id=request_id, lora_request=lora)


class Half:
    """A scheduler's half, and the ranks that report to it."""

    def __init__(self, ranks=1):
        self.adapters = Adapters(ranks)
        self.ranks = ranks

    def step(self, *loaded):
        """A step of all ranks; ``loaded``: (number, digest or one of each rank, changes)."""
        step, report = self.adapters.next_step(), None
        for rank in range(self.ranks):
            own = {
                number: {rank: Loaded(d if isinstance(d, str) else d[rank], changes)}
                for number, d, changes in loaded
            }
            report = merged(AdapterReport(step, own), report)
        self.adapters.received(report)

    def arrives(self, *args, cached=0, **kwargs):
        asked = request(*args, **kwargs)
        self.adapters.arrived(asked)
        self.adapters.cached(asked, cached)
        return asked


def test_an_adapter_is_asked_for_until_a_step_has_said_what_was_loaded():
    half = Half()
    half.step()
    asked = half.arrives()
    assert half.adapters.undecided(asked)
    half.step((1, "x", 0))
    assert not half.adapters.undecided(asked)
    assert half.adapters.begin(asked) == half.adapters.digest(asked) == "x False"
    later = half.arrives(request_id="s")
    assert not half.adapters.undecided(later), "it is known from now on"


def test_an_adapter_that_nobody_has_loaded_is_not_known(caplog):
    half = Half()
    asked = half.arrives()
    half.step()
    assert not half.adapters.undecided(asked)
    assert half.adapters.begin(asked) == ""
    half.step((1, "x", 0))  # it was loaded by that very request
    assert half.adapters.digest(asked) == ""
    assert caplog.text.count("adapter 'a' has is not known") == 1


def test_a_report_of_a_step_before_the_request_says_nothing_of_it():
    half = Half()
    step = half.adapters.next_step()
    asked = half.arrives()
    half.adapters.received(AdapterReport(step))
    assert half.adapters.undecided(asked)


def test_all_ranks_must_have_come_to_a_step():
    half = Half(ranks=2)
    asked = half.arrives()
    step = half.adapters.next_step()
    half.adapters.received(merged(AdapterReport(step), AdapterReport(step - 1)))
    assert half.adapters.undecided(asked)
    assert merged(None, AdapterReport(3)) == merged(AdapterReport(3), None) == AdapterReport(3)


def test_an_adapter_that_is_loaded_in_place_is_asked_for_each_time():
    """Its number stays: what was known of it may be of before."""
    half = Half()
    half.step((1, "x", 0))
    asked = half.arrives(inplace=True)
    assert half.adapters.undecided(asked)
    half.step((1, "y", 1))
    assert not half.adapters.undecided(asked)
    assert half.adapters.begin(asked) == "y False"


def test_an_adapter_that_changes_while_a_request_runs_is_not_known_to_it():
    half = Half()
    half.step((1, "x", 0))
    asked = half.arrives()
    assert half.adapters.begin(asked) == "x False"
    half.step((1, "y", 1))
    assert half.adapters.digest(asked) == ""
    half.step((1, "x", 2))
    assert half.adapters.digest(asked) == "", "and back"
    assert half.adapters.begin(half.arrives(request_id="s")) == "x False"


def test_all_ranks_must_have_said_what_they_loaded():
    half = Half(ranks=2)
    half.step((1, ("x", "x"), 0), (2, ("x", ""), 0), (3, ("x", "y"), 0), (4, ("y", "x"), 0))
    found = [half.adapters.begin(half.arrives(n, str(n))) for n in (1, 2, 3, 4)]
    assert found[0] == "x False" and found[1] == ""
    assert len({*found}) == 4, "each rank has only its experts"
    half.adapters.received(AdapterReport(9, {5: {0: Loaded("x", 0)}}))
    assert half.adapters.begin(half.arrives(5, "5")) == ""


@pytest.mark.parametrize("again", [1, 2])
def test_kv_of_an_adapter_before_it_was_loaded_anew_from_one_path_is_mixed_in(again):
    """vLLM's prefix cache knows adapters by name and path: it may give out what is over."""
    half = Half()
    half.step((1, "x", 0))
    first = half.arrives(cached=16)
    assert not half.adapters.mixed(first)
    half.step((again, "y", 1))
    later = half.arrives(again, "s", cached=16)
    assert half.adapters.mixed(later)
    clean = half.arrives(again, "u", cached=0)
    assert not half.adapters.mixed(clean), "nothing came from there"
    elsewhere = half.arrives(again + 1, "t", path="/b", cached=16)
    assert not half.adapters.mixed(elsewhere)


def test_requests_that_are_over_are_forgotten():
    half = Half()
    asked = half.arrives()
    half.adapters.ended("r")
    half.adapters.ended("r")
    assert not half.adapters.undecided(asked)
    assert half.adapters.begin(asked) == ""


def test_requests_without_an_adapter_are_not_kept_waiting():
    half = Half()
    asked = half.arrives(0)
    assert not half.adapters.undecided(asked) and not half.adapters.mixed(asked)
    assert half.adapters.begin(asked) is None


# -- prefill and decode ----------------------------------------------------------------------------

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture
def pair():
    """Halves of two engines, with one adapter each; neither has loaded it."""
    made = [
        Engine(
            name, "kv_both", NixlConfig(), RouterProtocol, address=("127.0.0.1", port), lora=True
        )
        for name, port in (("P", 7000), ("D", 7001))
    ]
    for engine in made:
        engine.half = Half()
        engine.half.adapters = engine.scheduler.adapters
    return made


def lora(path="/a", number=1, **changes):
    return {"lora_request": LoRARequest("a", number, path, **changes)}


def prefilled(p, cached=0, **fields):
    asked = p.arrives(PREFILL, **fields)
    assert p.scheduler.get_num_new_matched_tokens(asked, cached) == 0
    return p.finishes(asked)[1]


def test_one_adapter_at_two_paths_is_handed_over(pair):
    p, d = pair
    p.half.step((1, "x", 0))
    d.half.step((7, "x", 0))
    params = prefilled(p, **lora())
    asked = d.arrives(params, "at d", **lora("/b", 7))
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) == 40
    d.steps([RenewLease])


def test_another_adapter_of_that_name_is_computed_at_decode(pair, caplog):
    """534 of 534 tokens used to be taken from the other's KV, with HTTP 200."""
    p, d = pair
    p.half.step((1, "x", 0))
    d.half.step((1, "y", 0))
    asked = d.arrives(prefilled(p, **lora()), "at d", **lora())
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) == 0
    assert "the ticket is for another prompt" in caplog.text


def test_decode_waits_until_it_is_known_what_was_loaded(pair):
    p, d = pair
    p.half.step((1, "x", 0))
    asked = d.arrives(prefilled(p, **lora()), "at d", **lora())
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) is None
    d.half.step((1, "x", 0))
    d.steps([RenewLease])
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) == 40


def test_an_adapter_that_decode_never_loaded_is_computed_there(pair):
    p, d = pair
    p.half.step((1, "x", 0))
    asked = d.arrives(prefilled(p, **lora()), "at d", **lora())
    d.half.step()
    d.scheduler.take_orders()
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) == 0


def test_decode_takes_nothing_of_an_adapter_that_changed_after_it_was_asked_about(pair):
    p, d = pair
    p.half.step((1, "x", 0))
    d.half.step((1, "x", 0))
    asked = d.arrives(prefilled(p, **lora()), "at d", **lora())
    d.half.step((1, "y", 1))
    assert d.scheduler.get_num_new_matched_tokens(asked, 0) == 0
    d.scheduler.update_state_after_alloc(asked, SimpleNamespace(blocks=[[]]), 0)
    assert not any(isinstance(o, Fetch) for o in d.scheduler.take_orders())


def test_prefill_does_not_hand_over_what_it_does_not_know(pair):
    p, _ = pair
    asked = p.arrives(PREFILL, **lora())
    assert p.scheduler.get_num_new_matched_tokens(asked, 0) is None
    p.half.step()
    assert p.scheduler.get_num_new_matched_tokens(asked, 0) == 0
    p.half.step((1, "x", 0))  # loaded for this request: what it was before nobody has seen
    assert p.finishes(asked) == (False, None)


def test_prefill_does_not_hand_over_what_changed_on_the_way(pair):
    p, _ = pair
    p.half.step((1, "x", 0))
    asked = p.arrives(PREFILL, **lora())
    p.scheduler.get_num_new_matched_tokens(asked, 0)
    p.half.step((1, "y", 1))
    assert p.finishes(asked) == (False, None)


def test_prefill_does_not_hand_over_what_its_prefix_cache_had_of_before(pair):
    p, _ = pair
    p.half.step((1, "x", 0))
    p.half.step((1, "y", 1))
    assert prefilled(p, **lora(), cached=16) is None
    assert prefilled(p, **lora(), request_id="s", cached=0) is not None


def test_a_request_that_ends_before_its_adapter_is_known_lets_its_lease_go(pair):
    p, d = pair
    p.half.step((1, "x", 0))
    asked = d.arrives(prefilled(p, **lora()), "at d", **lora())
    assert d.finishes(asked) == (False, None)
    assert [type(order) for order in d.scheduler.take_orders()] == [RenewLease, Release]


# -- offloading ------------------------------------------------------------------------------------


def test_notes_of_one_digest_are_no_change():
    note(1, "x")
    note(1, "x")
    assert LoadedAdapters().take(0).loaded == {1: {0: Loaded("x", 0)}}
    note(1, "")
    note(1, "")
    assert LoadedAdapters().take(0).loaded == {1: {0: Loaded("", 2)}}
