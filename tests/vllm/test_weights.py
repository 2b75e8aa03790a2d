"""What tells weights apart: their content, never their name, path or time."""

import os
import shutil
from types import SimpleNamespace

import checkpoints
import pytest
from checkpoints import load_config, write, write_index
from safetensors.numpy import load_file, save_file

from kvconnect.vllm import sampling, weights
from kvconnect.vllm.sampling import sampled
from kvconnect.vllm.weights import weights_of


@pytest.fixture(autouse=True)
def engine_starts_later(monkeypatch):
    """Than the files of these tests are written."""
    monkeypatch.setattr(weights, "started_s", lambda: float("inf"))


def model(path, commit=None, revision=None, url=""):
    hf_config = SimpleNamespace(_commit_hash=commit)
    return SimpleNamespace(
        model=str(path), model_weights=url, revision=revision, hf_config=hf_config
    )


def digest(path, load=None, **changes):
    found = weights_of(model(path, **changes), load or load_config())
    assert found.known, found.why_not
    return found.digest


def why_not(path, load=None, **changes):
    found = weights_of(model(path, **changes), load or load_config())
    assert not found.known
    return found.why_not


# -- content ------------------------------------------------------------------------------------

SEEDS = {"layers.0.q": 1, "layers.0.k": 2, "layers.1.q": 3, "layers.1.k": 4}


@pytest.mark.parametrize("changed", SEEDS)
def test_any_tensor_that_differs_makes_another_model(tmp_path, changed):
    """Of equal size, and written at one time: only bytes differ."""
    for name, seeds in {"a/hf": SEEDS, "b/hf": SEEDS | {changed: 9}}.items():
        os.utime(write(tmp_path / name, seeds, nbytes=100_000), ns=(1, 1))
    assert digest(tmp_path / "a/hf") != digest(tmp_path / "b/hf")


@pytest.mark.parametrize("place", [0, 500_000, -1])
def test_the_first_middle_and_last_bytes_of_a_tensor_count(tmp_path, place):
    """Tokens that were added later are the last rows of an embedding."""
    path = write(tmp_path / "a", SEEDS, nbytes=1_000_000)
    tensors = {name: data.copy() for name, data in load_file(path).items()}
    tensors["layers.0.k"][place] ^= 1
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / path.name)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_copies_at_other_paths_and_times_are_the_same(tmp_path):
    path = write(tmp_path / "a", SEEDS)
    (tmp_path / "a" / "README.md").write_text("no weights")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "snapshot")
    os.utime(tmp_path / "b" / "snapshot" / path.name, ns=(1, 1))
    (tmp_path / "c").symlink_to(tmp_path / "b" / "snapshot")
    assert len({digest(tmp_path / name) for name in ("a", "b/snapshot", "c")}) == 1


def test_a_file_that_is_cut_off_missing_or_more_is_another_model(tmp_path):
    write(tmp_path, SEEDS, "model-00001-of-00002.safetensors")
    second = write(tmp_path, {"x": 5}, "model-00002-of-00002.safetensors", nbytes=100_000)
    whole = digest(tmp_path)
    os.truncate(second, second.stat().st_size - 50_000)
    cut = digest(tmp_path)
    second.unlink()
    missing = digest(tmp_path)
    assert len({whole, cut, missing}) == 3


def test_an_index_says_which_files_are_loaded(tmp_path):
    for folder, files in {"a": {"x": "one"}, "b": {"x": "two"}}.items():
        write(tmp_path / folder, {"x": 1}, "one.safetensors")
        write(tmp_path / folder, {"x": 2}, "two.safetensors")
        write_index(tmp_path / folder, files)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    write_index(tmp_path / "b", {"x": "one"})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_weights_in_folders_of_a_model_count(tmp_path):
    """A folder whose weights were all below it used to be a folder of nothing."""
    for name, seed in {"a": 1, "b": 2}.items():
        write(tmp_path / name / "text", {"x": seed})
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    for name in ("a", "b"):
        write(tmp_path / name, {"y": 1})
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_what_vllm_does_not_load_does_not_count(tmp_path):
    """A clone of a repository has more than vLLM downloads of it."""
    write(tmp_path / "a", SEEDS)
    write(tmp_path / "b", SEEDS)
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", ".git/lfs/x.safetensors"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"other")
    write(tmp_path / "b" / "original", {"x": 1})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("nbytes", [1000, 6 << 20])
@pytest.mark.parametrize(
    ("suffix", "load_format"),
    [(".bin", "auto"), (".pt", "pt"), (".gguf", "auto"), (".tensors", "tensorizer")],
)
def test_files_of_other_kinds_are_known_by_pages_of_them(tmp_path, suffix, load_format, nbytes):
    load = load_config(load_format)
    found = []
    for name, place in {"a": None, "copy": None, "first": 0, "last": -1}.items():
        data = bytearray(checkpoints.tensor(1, nbytes).tobytes())
        if place is not None:
            data[place] ^= 1
        (tmp_path / name).mkdir()
        (tmp_path / name / f"model{suffix}").write_bytes(data)
        (tmp_path / name / "training_args.bin").write_bytes(name.encode())
        found.append(digest(tmp_path / name, load))
    assert found[0] == found[1] and len(set(found)) == 3
    (tmp_path / "a" / f"model{suffix}").write_bytes(checkpoints.tensor(2, nbytes).tobytes())
    assert digest(tmp_path / "a", load) not in found


def test_a_model_that_is_one_file_may_be_called_anything(tmp_path):
    for name, seed in {"a.gguf": 1, "b.gguf": 1, "c.gguf": 2}.items():
        (tmp_path / name).write_bytes(checkpoints.tensor(seed, 5000).tobytes())
    a, b, c = (digest(tmp_path / name) for name in ("a.gguf", "b.gguf", "c.gguf"))
    assert a == b != c


def test_a_model_in_several_files_is_all_of_them(tmp_path):
    def parts(name, seeds):
        for part, seed in enumerate(seeds, 1):
            path = tmp_path / f"{name}-{part:05}-of-00002.gguf"
            path.write_bytes(checkpoints.tensor(seed, 5000).tobytes())
        return digest(tmp_path / f"{name}-00001-of-00002.gguf")

    assert parts("a", (1, 2)) == parts("b[x]", (1, 2)) != parts("c", (1, 3))


def test_a_header_that_is_none_is_content_as_any(tmp_path):
    found = []
    for n, header in enumerate([b"{", b"[1]", b'{"x": 1}', b'{"x": {"data_offsets": [5, 1]}}']):
        path = tmp_path / str(n) / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        found.append(digest(path.parent))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.safetensors").write_bytes(b"\xff" * 8)
    assert len({*found, digest(tmp_path / "4")}) == 5


# -- cost ---------------------------------------------------------------------------------------


def test_what_is_read_is_bounded_however_large_a_tensor_is(tmp_path):
    path = write(tmp_path, {str(n): n for n in range(8)}, nbytes=1 << 20)
    cost = sampled([("m", path)])
    assert 8 * 3 * sampling.PAGE <= cost.read_bytes < 8 * 3 * sampling.PAGE + 4096


def test_what_is_read_is_bounded_however_many_tensors_there_are(tmp_path, monkeypatch):
    path = write(tmp_path, {f"experts.{n}.w": n for n in range(400)}, nbytes=3 * sampling.PAGE + 1)
    header = path.stat().st_size - 400 * (3 * sampling.PAGE + 1)
    read = []
    for most in (1200, 1199, 100):
        monkeypatch.setattr(sampling, "MOST_PAGES", most)
        read.append((sampled([("m", path)]).read_bytes - header) // sampling.PAGE)
    assert read[:2] == [1200, 400] and 50 <= read[2] <= 150


def test_what_is_read_of_files_without_a_header_is_bounded(tmp_path):
    files = []
    for n in range(4):
        path = tmp_path / f"{n}.bin"
        with path.open("wb") as file:
            file.truncate(1 << 30)
        files.append((path.name, path))
    most = sampling.SPREAD_PAGES * sampling.PAGE + 4 * (sampling.BEGINNING + sampling.END)
    assert sampled(files).read_bytes == most


def test_weights_are_read_once_in_a_process_and_again_when_files_change(tmp_path, monkeypatch):
    path, calls = write(tmp_path, SEEDS), []

    def counted(files):
        calls.append(files)
        return sampled(files)

    monkeypatch.setattr(weights, "sampled", counted)
    before = digest(tmp_path)
    assert digest(tmp_path) == before and len(calls) == 1
    stat = path.stat()
    write(tmp_path, SEEDS | {"layers.0.k": 9})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest(tmp_path) != before and len(calls) == 2


# -- where there are no files -------------------------------------------------------------------


def hub(tmp_path, monkeypatch, commit="c0", **files):
    """A hub's cache with one model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    for name, seeds in files.items():
        write(snapshot, seeds, f"{name}.safetensors")
    return snapshot


def test_a_hub_s_model_is_the_files_in_its_cache(tmp_path, monkeypatch):
    snapshot = hub(tmp_path / "hub", monkeypatch, model=SEEDS)
    write(tmp_path / "local", SEEDS)
    assert digest("org/name", commit="c0") == digest(tmp_path / "local") == digest(snapshot)
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0")
    assert digest("org/name") == digest(snapshot), "its config did not say which commit it is of"


def test_a_hub_s_files_may_be_downloaded_while_the_engine_starts(tmp_path, monkeypatch):
    """They are never changed there."""
    hub(tmp_path, monkeypatch, model=SEEDS)
    before = digest("org/name", commit="c0")
    monkeypatch.setattr(weights, "started_s", lambda: 0.0)
    assert digest("org/name", commit="c0") == before


def test_a_hub_s_model_without_files_is_its_commit(tmp_path, monkeypatch):
    hub(tmp_path, monkeypatch)
    found = [digest("org/name", commit=commit) for commit in ("c1", "c2")]
    found.append(digest("org/name:Q4_K_M", commit="c1"))
    assert len(set(found)) == 3
    assert "the hub told no commit" in why_not("org/name")


UNKNOWN = {
    "object storage": ({"url": "s3://bucket/latest"}, load_config("runai_streamer"), "s3://bucket"),
    "a tensorizer's address": (
        {},
        load_config("tensorizer", model_loader_extra_config={"tensorizer_uri": "s3://b/x.tensors"}),
        "s3://b/x.tensors",
    ),
    "a loader of somebody's": ({}, load_config("acme"), "load_format is 'acme'"),
    "a cache's daemon": ({}, load_config("ipc_cache"), "load_format is 'ipc_cache'"),
    "only json": ({}, load_config(), "holds no file of weights"),
}


@pytest.mark.parametrize(("changes", "load", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_known_is_said(tmp_path, changes, load, why):
    """Of a folder of json alone, as vLLM makes for object storage, the digest was of no files."""
    (tmp_path / "config.json").write_text("{}")
    if why.startswith("load_format"):
        write(tmp_path, SEEDS)
    assert why in why_not(tmp_path, load, **changes)
    if "s3" in why:
        assert why in why_not(tmp_path, load, **changes, commit="c0"), "of its config alone"


def test_a_tensorizer_s_file_elsewhere_is_what_counts(tmp_path):
    found = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.tensors"
        path.write_bytes(checkpoints.tensor(seed, 5000).tobytes())
        for extra in ({"tensorizer_uri": str(path)}, SimpleNamespace(tensorizer_uri=str(path))):
            load = load_config("tensorizer", model_loader_extra_config=extra)
            found.append(digest("org/name", load))
    assert found[0] == found[1] != found[2] == found[3]


def test_files_that_cannot_be_read_are_not_known(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert "cannot be read (No such file" in why_not(tmp_path)


def test_files_that_changed_after_the_engine_had_started_are_not_known(tmp_path, monkeypatch):
    """They may not be what was loaded."""
    path = write(tmp_path / "v1", SEEDS)
    (tmp_path / "latest").symlink_to(tmp_path / "v1")
    later = path.stat().st_ctime
    monkeypatch.setattr(weights, "started_s", lambda: later - weights.START_SLACK_S - 1)
    for name in ("v1", "latest"):
        assert "was changed after this engine had started" in why_not(tmp_path / name)
    monkeypatch.setattr(weights, "started_s", lambda: later + 1)
    assert digest(tmp_path / "v1") == digest(tmp_path / "latest")


def test_a_process_knows_when_it_started(monkeypatch):
    monkeypatch.undo()
    assert 0 < weights.started_s() < os.stat("/proc/self").st_ctime + 60


def test_dummy_weights_are_the_same_everywhere():
    assert digest("anything", load_config("dummy")) == digest("else", load_config("dummy"))
