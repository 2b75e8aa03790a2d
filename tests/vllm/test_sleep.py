"""Sleep mode of vLLM 0.33: who can follow it, and what happens before memory is given back."""

from kvconnect.vllm import KVConnectNixl, KVConnectOffloading


def test_only_who_registers_no_memory_says_that_it_can_sleep():
    """vLLM's default is yes: NIXL would read what is mapped there no more."""
    assert not KVConnectNixl.supports_sleep_mode(None)
    base = getattr(KVConnectOffloading, "supports_sleep_mode", lambda _: True)
    assert base(None)
