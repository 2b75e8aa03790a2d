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
    "bidirectional": ({"bidirectional_kv_xfer": True}, "bidirectional_kv_xfer is true.*remove"),
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
