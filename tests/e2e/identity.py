"""Never another's KV: models and adapters of one name on real engines, and what that costs.

    python tests/e2e/identity.py --prompts 40

One decode engine, and prefill engines with the same weights at another path, with a fine-tune in a
folder of the same name, and with another adapter of one name. A foreign answer is one that is not
what decode answers alone; those that the other engine answers otherwise are counted too, as
prompts that would show it. Then the same with `model_id`, and the time of the digest for the model
and for 16 GB. Prints one line of JSON; exits with 1 if anything was wrong.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import conftest
from identities import copy_of
from nursery import Nursery
from pair import Client, Pair, Setup, in_parallel, words

from kvconnect.cli.engines import START_TIMEOUT_S
from kvconnect.cli.processes import Fleet
from kvconnect.vllm.sampling import PAGE, sampled

TOKENS, ANSWER = 200, 8
REFUSED = "weights is '"  # in decode's log: the field that differs, and both values
LAYERS, WIDTH, HIDDEN, KV_WIDTH, WORDS = 32, 4096, 14336, 1024, 128_256  # of Llama 3 8B, bf16
SHARDS, ROUNDS = 4, 9


class Trials:
    """Prompts at pairs of engines, and what was wrong."""

    def __init__(self, prompts: int) -> None:
        self.count, self.problems, self._seed = prompts, [], 10_000

    def prompts(self) -> list[list[int]]:
        """New ones."""
        self._seed += self.count
        return [words(TOKENS + n % 7, seed=self._seed + n) for n in range(self.count)]

    def kept_apart(self, what: str, pair: Pair, other: Client, **options: str) -> dict[str, int]:
        """Prompts through an engine whose KV is not decode's: no answer may be foreign."""
        asked, before = self.prompts(), pair.transferred()
        found = handed_over(pair, asked, other, **options)
        moved = int(pair.transferred() - before)
        ours, theirs = (alone(e, asked, **options) for e in (pair.decode, other))
        cached = in_parallel(lambda p: pair.decode.tokens(p, ANSWER, **options), asked)
        seen = {
            "foreign_answers": sum(a != b for a, b in zip(found, ours, strict=True)),
            "foreign_from_its_prefix_cache": sum(a != b for a, b in zip(cached, ours, strict=True)),
            "of": len(asked),
            "of_which_the_other_answers_otherwise": sum(
                a != b for a, b in zip(theirs, ours, strict=True)
            ),
            "bytes_transferred": moved,
        }
        wrong = seen["foreign_answers"] or seen["foreign_from_its_prefix_cache"] or moved
        if wrong or not seen["of_which_the_other_answers_otherwise"]:
            self.problems.append(f"{what}: {seen}")
        return seen

    def paired(self, what: str, pair: Pair) -> dict[str, int]:
        """Prompts between engines that must take each other's KV."""
        asked, before = self.prompts(), pair.computed_at_decode()
        found = handed_over(pair, asked, pair.prefill)
        seen = {
            "tokens_computed_at_decode": int(pair.computed_at_decode() - before),
            "right": sum(a == b for a, b in zip(found, alone(pair.decode, asked), strict=True)),
            "of": len(asked),
        }
        if seen["tokens_computed_at_decode"] or seen["right"] != len(asked):
            self.problems.append(f"{what}: {seen}")
        return seen

    def refused_by_name(self, pair: Pair) -> str:
        """What decode's log says of the weights."""
        log = pair.decode.server.log.read_text()
        for line in log.splitlines():
            if REFUSED in line and "both engines must serve the same model" in line:
                return line[line.index("peer ") :]
        self.problems.append("decode's log does not name the field that differs")
        return ""


def handed_over(pair, asked, prefill, **options):
    """Decode's answers to prompts that a prefill engine has computed."""

    def one(prompt):
        params = pair.prefilled(prompt, prefill, **options)
        return pair.decode.tokens(prompt, ANSWER, kv_transfer_params=params, **options)

    return in_parallel(one, asked)


def alone(engine, asked, **options):
    """An engine's own answers: the salt keeps it from using what it was given."""
    salt = {"cache_salt": "alone"}
    return in_parallel(lambda prompt: engine.tokens(prompt, ANSWER, **salt, **options), asked)


def models(trials: Trials, fleet: Fleet, folder: Path) -> dict[str, object]:
    """The small real model, a copy of it, and a copy with other values in one layer."""
    ours = conftest.model("KVCONNECT_MODEL")
    setup = Setup(
        ours,
        prefill_model=copy_of(ours, folder / "elsewhere"),
        both=conftest.SHORT,
        extra={"kv_lease_duration": 10},
        policy="recompute",
    )
    pair = setup.start(fleet)
    tuned = copy_of(ours, folder / "tuned", scaled=4.0)
    server = pair.start("prefill", tuned)
    fleet.wait_up([server], START_TIMEOUT_S)
    return {
        "fine_tune_in_a_folder_of_one_name": trials.kept_apart(
            "fine-tune", pair, Client(server, tuned.name)
        ),
        "refused": trials.refused_by_name(pair),
        "same_weights_at_two_paths": trials.paired("two paths", pair),
    }


def named(trials: Trials, fleet: Fleet, folder: Path) -> dict[str, object]:
    """The same weights at two paths, with one `model_id`."""
    ours = conftest.model("KVCONNECT_TP_MODEL")
    setup = Setup(
        ours,
        prefill_model=copy_of(ours, folder / "named"),
        both=conftest.SHORT,
        extra={"model_id": "ours"},
    )
    return {"with_model_id": trials.paired("model_id", setup.start(fleet))}


def adapters(trials: Trials, fleet: Fleet, folder: Path) -> dict[str, object]:
    """One adapter name, and other weights on either side."""
    (folder / "adapters").mkdir()
    pair = conftest.identity_pair(folder / "adapters").start(fleet)
    return {
        "adapter_of_one_name": trials.kept_apart("adapter", pair, pair.prefill, model="clash"),
    }


def digest_ms(files: list[tuple[str, Path]]) -> dict[str, object]:
    """The time for a digest of files, with what it reads in memory and not; shortest, longest."""

    def timed(forget: bool) -> float:
        for _, path in files if forget else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        sampled(files)
        return (time.perf_counter() - began) * 1e3

    def rounds(forget: bool) -> list[float]:
        times = [round(timed(forget), 1) for _ in range(ROUNDS)]
        return [min(times), max(times)]

    size = sum(path.stat().st_size for _, path in files)
    return {
        "gb": round(size / 1e9, 2),
        "read_mb": round(sampled(files).read_bytes / 1e6, 1),
        "in_memory_ms": rounds(False),
        "from_disk_ms": rounds(True),
    }


def large_model(folder: Path) -> list[tuple[str, Path]]:
    """Files of the size and tensors of Llama 3 8B: every tensor's first, middle and last pages are
    random, all else is a hole in the file, which a digest does not read."""
    layer = {"input_layernorm": [WIDTH], "post_attention_layernorm": [WIDTH]}
    layer |= {f"self_attn.{one}_proj": [WIDTH, WIDTH] for one in "qo"}
    layer |= {f"self_attn.{one}_proj": [KV_WIDTH, WIDTH] for one in "kv"}
    layer |= {f"mlp.{one}_proj": [HIDDEN, WIDTH] for one in ("gate", "up")}
    layer |= {"mlp.down_proj": [WIDTH, HIDDEN]}
    shapes = {f"layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()}
    shapes |= {"embed_tokens": [WORDS, WIDTH], "lm_head": [WORDS, WIDTH], "norm": [WIDTH]}
    files, names = [], list(shapes)
    for shard in range(SHARDS):
        header, at = {}, 0
        for name in names[shard::SHARDS]:
            size = 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [at, at + size],
            }
            at += size
        path = folder / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        write_sparse(path, header, at)
        files.append((path.name, path))
    return files


def write_sparse(path: Path, header: dict[str, dict[str, list[int]]], nbytes: int) -> None:
    """A safetensors file of which the pages around each tensor's start, middle and end exist."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + nbytes)
        for tensor in header.values():
            first, end = tensor["data_offsets"]
            for at in (first, (first + end) // 2 - PAGE, end - 2 * PAGE):
                file.seek(start + max(first, at))
                file.write(os.urandom(min(2 * PAGE, end - max(first, at))))
        file.flush()
        os.fsync(file.fileno())  # else they cannot be forgotten


def digests(folder: Path) -> dict[str, dict[str, object]]:
    """Of the small real model, and of 16 GB."""
    small = copy_of(conftest.model("KVCONNECT_MODEL"), folder / "measured")
    os.sync()
    large = folder / "large"
    large.mkdir()
    return {
        "small": digest_ms([("model.safetensors", small / "model.safetensors")]),
        "large": digest_ms(large_model(large)),
    }


def run(prompts: int, folder: Path, logs: Path) -> dict[str, object]:
    """A report; models are made in ``folder``."""
    began, trials = time.monotonic(), Trials(prompts)
    found: dict[str, object] = {"digest": digests(folder)}
    parts: list[Callable[..., dict[str, object]]] = [models, adapters, named]
    with Nursery() as nursery:
        for part in parts:
            with Fleet(logs / part.__name__, nursery.launch) as fleet:
                found |= part(trials, fleet, folder)
    return found | {
        "seconds": round(time.monotonic() - began),
        "problems": trials.problems,
        "logs": str(logs),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-identity-"))
    with tempfile.TemporaryDirectory(prefix="kvconnect-identity-models-") as scratch:
        report = run(given.prompts, Path(scratch), logs)
    print(json.dumps(report), flush=True)
    sys.exit(bool(report["problems"]))
