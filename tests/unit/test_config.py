"""Options are parsed once; what an operator got wrong is named, with the remedy."""

import logging

import pytest

from kvconnect.config import (
    INERT_OPTIONS,
    MooncakeConfig,
    NixlConfig,
    Settings,
    parse,
    read_secret,
)
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig


def parsed(**options):
    return parse(options, NixlConfig, "KVConnectNixl")


def test_options_keep_their_in_tree_names_and_defaults():
    assert parsed() == NixlConfig()
    config = parsed(backends=["LIBFABRIC"], kv_lease_duration=7)
    assert config.chosen_transport("cuda") == ("nixl", {"backends": ["LIBFABRIC"]})
    assert parsed(kv_lease_duration=7).kv_lease_duration == 7


def test_an_unknown_option_names_the_nearest_one():
    with pytest.raises(
        ConfigError,
        match=r"KVConnectNixl: unknown option 'kv_lease_duratoin'.*"
        r"did you mean 'kv_lease_duration'",
    ):
        parsed(kv_lease_duratoin=7)


def test_an_unknown_option_that_is_like_nothing_lists_all():
    with pytest.raises(ConfigError, match=r"'zzz'.*known options: .*kv_lease_duration.*backends"):
        parsed(zzz=1)


@pytest.mark.parametrize("name", INERT_OPTIONS)
def test_an_in_tree_option_without_effect_is_accepted_and_said(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert parsed(**{name: 4}) == NixlConfig()
    assert f"{name} has no effect: {INERT_OPTIONS[name]}" in caplog.text


BAD = {
    "no backend": ({"backends": []}, "backends is empty"),
    "backend is text": ({"backends": "UCX"}, "backends"),
    "zero seconds": ({"kv_lease_duration": 0}, "kv_lease_duration"),
    "text for seconds": ({"load_timeout": "soon"}, "load_timeout"),
    "not a number": ({"load_timeout": float("nan")}, "load_timeout"),
    "beyond a day": ({"handshake_timeout": 1e9}, "handshake_timeout"),
    "a size for seconds": ({"load_timeout": "10GiB"}, "load_timeout"),
    "half a byte": ({"staging_bytes": "lots"}, "staging_bytes"),
    "max below lease": (
        {"kv_lease_duration": 50, "kv_lease_max_duration": 20},
        r"kv_lease_max_duration is 20 s, expected at least kv_lease_duration \(50 s\)",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_a_value_that_cannot_work_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        parsed(**options)


def test_no_secret_file_is_no_secret():
    assert read_secret(None) is None


def test_a_secret_may_be_in_the_environment_and_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCONNECT_AUTH_SECRET", " fedcba9876543210\n")
    assert read_secret(None) == read_secret(None, required=True) == b"fedcba9876543210"
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef")
    assert read_secret(str(path)) == b"0123456789abcdef"
    monkeypatch.setenv("KVCONNECT_AUTH_SECRET", "short")
    with pytest.raises(ConfigError, match=r"KVCONNECT_AUTH_SECRET holds 5 bytes"):
        read_secret(None)


def test_without_a_secret_that_is_required_nothing_starts():
    with pytest.raises(ConfigError, match=r"require_auth.*openssl rand.*KVCONNECT_AUTH_SECRET"):
        read_secret(None, required=True)


def test_a_secret_is_the_files_content_without_white_space(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"  0123456789abcdef\n")
    assert read_secret(str(path)) == b"0123456789abcdef"


@pytest.mark.parametrize("content", [b"", b"\n", b"short", b"15 bytes long.."])
def test_a_secret_that_is_too_short_is_refused_with_its_length(tmp_path, content):
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"holds {len(content.strip())} bytes.*openssl rand"):
        read_secret(str(path))


def test_a_secret_file_that_is_not_there_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"No such file.*openssl rand -hex 32"):
        read_secret(str(tmp_path / "absent"))


def test_a_directory_is_no_secret_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(str(tmp_path))


def test_a_configuration_of_the_in_tree_mooncake_connector_starts():
    options = {"mooncake_protocol": "tcp", "device_name": "mlx5_0", "num_workers": 10}
    options["bootstrap_server_address"] = "10.0.0.1:8998"
    config = parse(options, MooncakeConfig, "KVConnectMooncake")
    assert config.bootstrap_server_address == "10.0.0.1:8998"
    assert config.chosen_transport("cpu") == (
        "mooncake",
        {"mooncake_protocol": "tcp", "device_name": "mlx5_0"},
    )


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1e9, 10**9),
        ("1e9", 10**9),
        ("1000000000", 10**9),
        ("10GiB", 10 << 30),
        ("1.5 GiB", 3 << 29),
        ("64Mi", 64 << 20),
        ("2 GB", 2 * 10**9),
        (0.7 * (1 << 30), int(0.7 * (1 << 30))),
    ],
)
def test_a_size_may_be_a_float_or_text_with_a_unit(value, nbytes):
    """``--kv-offloading-size 1`` gives a float; so do YAML and Helm."""
    assert parse({"cpu_bytes_to_use": value}, OffloadConfig, "test").cpu_bytes_to_use == nbytes
    assert parsed(staging_bytes=value).staging_bytes == nbytes


def test_numbers_and_truth_values_may_be_text():
    found = parsed(kv_lease_duration="60", load_timeout="1.5", allow_lossy="True")
    assert found == NixlConfig(kv_lease_duration=60, load_timeout=1.5, allow_lossy=True)
    assert parse({"cpu_bytes_to_use": 1 << 30, "block_size": 32.0}, OffloadConfig, "t").block_size
    with pytest.raises(ConfigError, match="block_size"):
        parse({"cpu_bytes_to_use": 1 << 30, "block_size": 32.5}, OffloadConfig, "t")


STOCK = {
    "nixl": (
        NixlConfig,
        {
            "backends": ["UCX"],
            "num_threads": 4,
            "engine_ttl": 3600,
            "kv_lease_duration": 30,
            "enforce_handshake_compat": False,
            "enable_cross_layers_blocks": "True",
            "push_registration_timeout": 480,
            "bidirectional_kv_xfer": True,
            "kv_recompute_threshold": 128,
            "decoder_kv_blocks_ttl": 600,
        },
    ),
    "mooncake": (
        MooncakeConfig,
        {
            "mooncake_protocol": "rdma",
            "device_name": "mlx5_0",
            "num_workers": "10",
            "custom_mem_pool": "NVLINK",
            "bootstrap_server_address": "10.0.0.1:8998",
        },
    ),
    "offloading": (
        OffloadConfig,
        {
            "cpu_bytes_to_use": 1e9,
            "spec_name": "TieringOffloadingSpec",
            "spec_module_path": "vllm.v1.kv_offload.tiering.spec",
            "blocks_per_chunk": "4",
            "eviction_policy": "arc",
            "cache_policy_module_path": "policies",
            "store_threshold": "2",
            "max_tracker_size": 64000,
            "offload_prompt_only": "true",
            "self_describing_kv_events": True,
            "canonical_layout": True,
            "sync_load_budget_bytes": 0,
            "tier_poll_interval_s": 0.001,
            "backpressure": {},
            "secondary_tiers": [{"type": "fs", "root_dir": "/kv"}],
        },
    ),
}


@pytest.mark.parametrize(("schema", "options"), STOCK.values(), ids=STOCK)
def test_a_configuration_written_for_vllms_own_connector_starts(schema, options):
    parse(options, schema, "test")


@pytest.mark.parametrize(
    ("schema", "option", "value"),
    [(schema, *one) for schema, options in STOCK.values() for one in options.items()],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_stock_option_is_honoured_or_said_to_have_no_effect(schema, option, value, caplog):
    needed = {"cpu_bytes_to_use": 2e9} if schema is OffloadConfig else {}
    without = parse(needed, schema, "test")
    caplog.clear()
    changed = parse(needed | {option: value}, schema, "test") != without
    said = f"test: {option} has no effect: " in caplog.text
    assert said == (option in schema.inert)
    same = ("kv_lease_duration",)  # what is given here is the default
    assert said or changed or option in same


def test_a_secondary_tier_of_files_is_our_disk(caplog):
    tiers = [{"type": "obj"}, {"type": "fs", "root_dir": "/kv"}, {"type": "fs", "root_dir": "/b"}]
    options = {"cpu_bytes_to_use": "1GiB", "secondary_tiers": tiers}
    found = parse(options, OffloadConfig, "test")
    assert (found.disk_path, found.disk_bytes) == ("/kv", 4 << 30)
    assert "the secondary tier of type 'obj' has no effect" in caplog.text
    assert "of type 'fs' has no effect" in caplog.text, "there is one disk"
    assert "4 times what memory has" in caplog.text
    assert parse(options | {"disk_bytes": "2GiB"}, OffloadConfig, "t").disk_bytes == 2 << 30
    with pytest.raises(ConfigError, match="expected a list of tiers"):
        parse(options | {"secondary_tiers": "fs"}, OffloadConfig, "test")


def test_the_folder_of_vllms_example_connector_is_a_disk_that_is_shared_and_kept(caplog):
    found = parse({"shared_storage_path": "/kv"}, OffloadConfig, "test")
    assert (found.disk_path, found.disk_bytes, found.cpu_bytes_to_use) == ("/kv", 4 << 30, 1 << 30)
    assert found.persist
    assert found.share
    assert "test: shared_storage_path is disk_path here" in caplog.text
    given = {"shared_storage_path": "/kv", "cpu_bytes_to_use": "2GiB", "share": False}
    found = parse(given, OffloadConfig, "test")
    assert (found.cpu_bytes_to_use, found.share) == (2 << 30, False)


def test_tiers_beside_the_folder_of_vllms_example_connector_are_warned_of(caplog):
    options = {"shared_storage_path": "/a", "secondary_tiers": [{"type": "fs", "root_dir": "/b"}]}
    assert parse(options, OffloadConfig, "KVConnectOffloading").disk_path == "/a"
    assert "of type 'fs' has no effect" in caplog.text, "there is one disk"


def test_a_chunk_is_said_in_tokens_or_in_blocks():
    options = {"cpu_bytes_to_use": "1GiB", "blocks_per_chunk": 2, "block_size": 32}
    with pytest.raises(ConfigError, match="give one of them"):
        parse(options, OffloadConfig, "test")


def test_options_of_one_transport_are_unknown_to_the_other():
    with pytest.raises(ConfigError, match="unknown option 'backends'"):
        parse({"backends": ["UCX"]}, MooncakeConfig, "KVConnectMooncake")
    with pytest.raises(ConfigError, match="unknown option 'num_workers'"):
        parsed(num_workers=10)


def test_options_of_a_transport_that_is_not_used_have_no_effect_and_it_is_said(caplog):
    config = parsed(transport="ucx", backends=["LIBFABRIC"])
    assert config.chosen_transport("cpu") == ("ucx", {})
    assert "backends has no effect with transport 'ucx'" in caplog.text


def test_another_transport_can_be_named_with_options_of_its_own():
    assert parsed().chosen_transport("cpu") == ("nixl", {})
    acme = parsed(transport="acme", transport_options={"x": 1})
    assert acme.chosen_transport("cpu") == ("acme", {"x": 1})
    with pytest.raises(ConfigError, match="without transport"):
        parsed(transport_options={"x": 1})


def test_a_mover_without_options_waits_as_long_as_the_options_say():
    """The handshake's default used to be 5 s here and 10 s there."""
    options, made = NixlConfig(), Settings(0, 1, {}, "loopback")
    assert made.handshake_timeout_s == options.handshake_timeout
    assert made.load_timeout_s == options.load_timeout
    assert made.lease_max_s == options.kv_lease_max_duration
    assert made.mode == options.transfer_mode
