"""Never another's KV: weights and adapters are what they contain, whatever they are called."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from identities import copy_of, write_adapter
from pair import Client, Pair, eventually, in_parallel, words

from kvconnect.cli.engines import START_TIMEOUT_S

COUNT, TOKENS, ANSWER = 6, 200, 8


def prompts(seed: int, count: int = COUNT) -> list[list[int]]:
    return [words(TOKENS + n, seed=seed + n) for n in range(count)]


def through(pair: Pair, asked: list[list[int]], prefill: Client | None = None, **options):
    """Answers of decode to prompts that a prefill engine has computed."""

    def one(prompt: list[int]) -> list[int]:
        params = pair.prefilled(prompt, prefill, **options)
        return pair.decode.tokens(prompt, ANSWER, kv_transfer_params=params, **options)

    return in_parallel(one, asked)


def alone(engine: Client, asked: list[list[int]], **options) -> list[list[int]]:
    """An engine's own answers: the salt keeps it from using what it was given."""
    salt = {"cache_salt": "alone"}
    return in_parallel(lambda p: engine.tokens(p, ANSWER, **salt, **options), asked)


def test_one_model_at_two_paths_is_one_and_speculation_by_n_grams_is_no_difference(
    identity_pair: Pair,
):
    asked, before = prompts(10_000), identity_pair.computed_at_decode()
    found = through(identity_pair, asked)
    assert identity_pair.computed_at_decode() - before == 0
    assert found == alone(identity_pair.decode, asked)


@pytest.fixture
def tuned(identity_pair: Pair, tmp_path: Path) -> Iterator[Client]:
    """A prefill engine with a fine-tune in a folder of the same name."""
    path = copy_of(identity_pair.setup.model, tmp_path, scaled=4.0)
    server = identity_pair.start("prefill", path)
    identity_pair.fleet.wait_up([server], START_TIMEOUT_S)
    yield Client(server, path.name)
    server.kill()


def test_a_fine_tune_in_a_folder_of_one_name_is_refused(identity_pair: Pair, tuned: Client):
    """All prompt tokens used to be taken from the other's KV, with HTTP 200 and wrong answers,
    and what was taken stayed in decode's own prefix cache."""
    asked, before = prompts(20_000), identity_pair.transferred()
    found = through(identity_pair, asked, tuned)
    ours = alone(identity_pair.decode, asked)
    assert found == ours
    assert [identity_pair.decode.tokens(p, ANSWER) for p in asked] == ours, "from its prefix cache"
    assert alone(tuned, asked) != ours, "the fine-tune answers alike: this shows nothing"
    assert identity_pair.transferred() == before
    log = identity_pair.decode.server.log.read_text()
    assert "weights is '" in log and "both engines must serve the same model" in log


def test_an_adapter_is_handed_over_wherever_its_files_are(identity_pair: Pair):
    asked, before = prompts(30_000), identity_pair.computed_at_decode()
    found = through(identity_pair, asked, model="shared")
    assert identity_pair.computed_at_decode() - before == 0
    assert found == alone(identity_pair.decode, asked, model="shared")
    assert found != alone(identity_pair.decode, asked), "the adapter changes nothing"


def test_another_adapter_of_one_name_is_computed_at_decode(identity_pair: Pair):
    """534 of 534 prompt tokens used to be taken from the other's KV, and 0 of 6 answers right."""
    asked, before = prompts(40_000), identity_pair.transferred()
    found = through(identity_pair, asked, model="clash")
    ours = alone(identity_pair.decode, asked, model="clash")
    assert found == ours
    assert alone(identity_pair.prefill, asked, model="clash") != ours, "this shows nothing"
    assert identity_pair.transferred() == before


def test_an_adapter_is_what_was_loaded_and_not_what_its_files_became(
    identity_pair: Pair, tmp_path: Path
):
    def load(path: Path, seed: int, inplace: bool) -> None:
        write_adapter(path, identity_pair.setup.model, seed)
        body = {"lora_name": "moving", "lora_path": str(path), "load_inplace": inplace}
        assert identity_pair.prefill.request("POST", "/v1/load_lora_adapter", body)[0] == 200

    def transfers(seed: int) -> bool:
        """Answers are those of decode alone in any case."""
        asked, before = prompts(seed, 3), identity_pair.transferred()
        found = through(identity_pair, asked, model="moving")
        assert found == alone(identity_pair.decode, asked, model="moving")
        return identity_pair.transferred() > before

    at_decode = write_adapter(tmp_path / "decode", identity_pair.setup.model, 5)
    body = {"lora_name": "moving", "lora_path": str(at_decode)}
    assert identity_pair.decode.request("POST", "/v1/load_lora_adapter", body)[0] == 200
    load(tmp_path / "one", 5, inplace=False)
    assert transfers(50_000)
    write_adapter(at_decode, identity_pair.setup.model, 6)  # nobody has loaded that
    assert transfers(51_000)
    load(tmp_path / "other", 7, inplace=True)  # the name is pointed elsewhere
    assert not transfers(52_000)
    load(tmp_path / "other", 5, inplace=True)  # loaded in place
    assert transfers(53_000)


def test_no_lease_is_left(identity_pair: Pair):
    held = "vllm:kv_cache_usage_perc"
    eventually(lambda: identity_pair.prefill.metric(held) == 0, 40, "all leases have ended")
