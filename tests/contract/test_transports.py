"""Every transport keeps the same contract, the fakes included."""

import importlib.util

import pytest

from kvconnect.errors import ConfigError
from kvconnect.testing import Faulty, check_transport
from kvconnect.testing.transport import CHECKS
from kvconnect.transport.loopback import Fabric, LoopbackTransport

every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


def loopback(ours, theirs):
    fabric = Fabric()
    return LoopbackTransport(ours, fabric), LoopbackTransport(theirs, fabric)


def faulty_loopback(ours, theirs):
    acting, passive = loopback(ours, theirs)
    return Faulty(acting), Faulty(passive)


def nixl(ours, theirs):
    from kvconnect.transport.nixl import NixlTransport

    return NixlTransport(ours), NixlTransport(theirs)


@every_check
def test_loopback_keeps_the_contract(check):
    check(loopback)


@every_check
def test_faulty_without_faults_keeps_the_contract(check):
    check(faulty_loopback)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("nixl"), reason="nixl is not installed")
@every_check
def test_nixl_keeps_the_contract(check):
    check(nixl)


def test_the_whole_suite_is_one_call():
    check_transport(loopback)


def test_the_suite_notices_a_transport_that_moves_nothing():
    class Idle(LoopbackTransport):
        def _move(self, work):
            return None

    def idle(ours, theirs):
        fabric = Fabric()
        return Idle(ours, fabric), Idle(theirs, fabric)

    with pytest.raises(AssertionError, match="other bytes changed"):
        check_transport(idle)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("nixl"), reason="nixl is not installed")
def test_a_nixl_backend_that_is_absent_is_a_startup_error():
    from kvconnect.transport.nixl import NixlTransport

    with pytest.raises(ConfigError, match="NOPE"):
        NixlTransport([], backends=["NOPE"])
