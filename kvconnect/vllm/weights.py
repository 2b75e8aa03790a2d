"""Which weights an engine serves, by their content: names are not identities.

* From the files that vLLM loads: the same at every path and on every machine, another for another
  fine-tune in a folder of the same name. See `kvconnect.vllm.sampling` for what is read of them.
* Where there are no files, the hub's commit.
* Where neither is known (object storage, a loader that takes weights from elsewhere, files that
  were changed while the engine started from them) it is said why; then nothing may be shared,
  unless the option ``model_id`` says what the weights are.
* Known once, from the files: that a running engine's weights were updated is not seen here.
"""

import fnmatch
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]  # vLLM's own dependency

from kvconnect.vllm.sampling import sampled

# load_format → suffixes of the files that it reads, the first of which there are any
_TENSORS = (".safetensors",)
_ANY = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
FORMATS = {
    **dict.fromkeys(("auto", "hf", "bitsandbytes"), _ANY),
    **dict.fromkeys(("safetensors", "fastsafetensors", "instanttensor", "mistral"), _TENSORS),
    **dict.fromkeys(("runai_streamer", "runai_streamer_sharded", "sharded_state"), _TENSORS),
    "pt": (".pt", ".pth"),
    "npcache": (".bin",),
    "gguf": (".gguf",),
    "tensorizer": (".tensors",),
}
NO_WEIGHTS = {
    "optimizer.bin",
    "optimizer.pt",
    "rng_state.pth",
    "scaler.pt",
    "scheduler.bin",
    "scheduler.pt",
    "training_args.bin",
}
"""Files that a trainer leaves next to weights, with the same suffix."""
MOST_INDEX = 64 << 20
START_SLACK_S = 2.0
"""A process imports for longer before it reads weights; its start is known to a second."""


class Weights(NamedTuple):
    """Which weights; "" is not known, and ``why_not`` says why."""

    digest: str
    why_not: str = ""

    @property
    def known(self) -> bool:
        return bool(self.digest)


class _UnknownError(Exception):
    """Carries why the weights cannot be told from others."""


def weights_of(model_config: Any, load_config: Any) -> Weights:
    """The weights that vLLM loads with these configs."""
    try:
        return Weights(_digest(model_config, load_config))
    except _UnknownError as e:
        return Weights("", str(e))
    except OSError as e:
        return Weights("", f"{e.filename or model_config.model} cannot be read ({e.strerror})")


def unlike_any(weights: Weights) -> str:
    """A text for weights that are not known, equal to no other engine's, with the remedy."""
    why = weights.why_not[:280]
    return f"unknown, set model_id on both engines ({why}) {secrets.token_hex(8)}"


def _digest(model: Any, load: Any) -> str:
    if load.load_format == "dummy":
        return "dummy"  # vLLM fills them from a fixed seed
    suffixes = FORMATS.get(load.load_format)
    if suffixes is None:
        raise _UnknownError(f"load_format is {load.load_format!r}: what it loads is not known here")
    place = _place(model, load)
    if not os.path.exists(place):
        folder = _hub_snapshot(place, model, load)
        if folder is not None and (files := _files(folder, suffixes, load)):
            return _sampled(files, None)
        if commit := getattr(model.hf_config, "_commit_hash", None):
            return f"commit {commit} {place.partition(':')[2]}".rstrip()
        raise _UnknownError(f"no files of {place} were found, and the hub told no commit")
    path = Path(place)
    files = _files(path, suffixes, load) if path.is_dir() else _parts(path)
    if not files:
        raise _UnknownError(f"{place} holds no file of weights ({', '.join(suffixes)})")
    return _sampled(files, path)


def _place(model: Any, load: Any) -> str:
    """Where vLLM looks for weights, which need not be where it looks for the config."""
    place = str(getattr(model, "model_weights", "") or model.model)
    if load.load_format == "tensorizer":
        extra = load.model_loader_extra_config
        told = extra.get if isinstance(extra, dict) else functools.partial(getattr, extra)
        place = str(told("tensorizer_dir", None) or told("tensorizer_uri", None) or place)
    if "://" in place:
        raise _UnknownError(f"they are at {place}: an address, not content")
    return place


def _hub_snapshot(name: str, model: Any, load: Any) -> Path | None:
    """Where the hub's library keeps the files of a model that is named, not a path."""
    from huggingface_hub import constants

    commit = getattr(model.hf_config, "_commit_hash", None)
    for cache in filter(None, (load.download_dir, str(constants.HF_HUB_CACHE))):
        repository = Path(cache) / f"models--{name.partition(':')[0].replace('/', '--')}"
        reference = repository / "refs" / (model.revision or "main")
        if commit is None and reference.is_file():
            commit = reference.read_text().strip()
        if commit and (snapshot := repository / "snapshots" / str(commit)).is_dir():
            return snapshot
    return None


def _files(folder: Path, suffixes: tuple[str, ...], load: Any) -> list[tuple[str, Path]]:
    """Files of weights in a folder and below, by their path in it.

    Of one kind: vLLM takes the first of which there are any at the top.
    """
    patterns = load.ignore_patterns or ()
    ignored = [patterns] if isinstance(patterns, str) else list(patterns)
    found = [
        (name, folder / name)
        for name in sorted(_walk(folder))
        if name.endswith(suffixes)
        and os.path.basename(name) not in NO_WEIGHTS
        and not name.startswith("original/")
        and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    ]
    top = [name for name, _ in found if "/" not in name]
    for names in (top, [name for name, _ in found]):
        for suffix in suffixes:
            if any(name.endswith(suffix) for name in names):
                return [(name, path) for name, path in found if name.endswith(suffix)]
    return []


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(root, folder)
        yield from (name if inside == "." else f"{inside}/{name}" for name in names)


def _parts(path: Path) -> list[tuple[str, Path]]:
    """A model that is one file, whatever its name, or one that is split into several."""
    split = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    if split is None:
        return [(path.suffix, path)]
    first, last = split.groups()
    parts = path.parent.glob(f"{_literal(first)}*{_literal(last)}")
    return [(part.name[len(first) :], part) for part in sorted(parts)]


def _literal(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _sampled(files: list[tuple[str, Path]], given: Path | None) -> str:
    """``given``: the path that a user wrote, whose files may change; a hub's never do."""
    stats = [path.stat() for _, path in files]
    if given is not None:
        _check_unchanged([*zip((p for _, p in files), stats, strict=True), (given, given.lstat())])
    told = tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats)
    index = _index(files[0][1].parent) if "/" not in files[0][0] else ""
    found = f"{_cached(tuple(files), told)} {index}"
    return hashlib.blake2b(found.encode(), digest_size=16).hexdigest()


def started_s() -> float:
    """When this process was started, which has loaded the weights, or had others load them."""
    return float(psutil.Process().create_time())


def _check_unchanged(found: list[tuple[Path, os.stat_result]]) -> None:
    """What changed after this process started may not be what was loaded."""
    latest = started_s() + START_SLACK_S
    for path, stat in found:
        if stat.st_ctime > latest and (path.is_symlink() or not path.is_dir()):
            raise _UnknownError(f"{path} was changed after this engine had started")


@functools.lru_cache(maxsize=16)
def _cached(files: tuple[tuple[str, Path], ...], told: tuple[tuple[int, ...], ...]) -> str:  # noqa: ARG001 - the key
    return sampled(files).digest


def _index(folder: Path) -> str:
    """Which file has which tensor, as indices say it: vLLM does not load other files."""
    maps = {}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        if path.stat().st_size <= MOST_INDEX:
            try:
                maps[path.name] = json.loads(path.read_bytes()).get("weight_map")
            except (ValueError, AttributeError, RecursionError):
                continue
    return json.dumps(maps, sort_keys=True) if maps else ""
