"""UCX's own guards, over a library that does what the test says; ucxx need not be installed."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvconnect.errors import TransportError
from kvconnect.transport.ucx import transport as ucx

TAG = 7


class Endpoint:
    def __init__(self):
        self.alive, self.closed, self.sent = True, 0, []

    def tag_send(self, data, tag):
        self.sent.append((bytes(data), tag))
        return "handle"

    def close_blocking(self):
        self.closed += 1


class UcxError(Exception):
    pass


class Library:
    """In the place of `ucx.UcxxLibrary`."""

    translated = ucx.UcxxLibrary.translated
    send = ucx.UcxxLibrary.send
    array = staticmethod(lambda data: data)

    def __init__(self):
        self.ucx = SimpleNamespace(
            UCXXTag=lambda tag: tag, UCXXTagMask=lambda mask: mask, UCXError=UcxError
        )
        self.made, self.arrived, self.received = [], [], []

    def worker(self):
        return self

    @property
    def address(self):
        return np.frombuffer(b"here", np.uint8)

    def connect(self, worker, address):
        if address == b"bad":
            raise UcxError("no")
        self.made.append(Endpoint())
        return self.made[-1]

    def progress(self):
        return None

    def tag_probe(self, tag, mask, remove):
        if not self.arrived:
            return SimpleNamespace(matched=False)
        sender_tag, length = self.arrived.pop(0)
        return SimpleNamespace(matched=True, sender_tag=sender_tag, length=length)

    def tag_recv_with_handle(self, array, found):
        self.received.append(len(array))
        return "handle"


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(ucx, "UcxxLibrary", lambda: library)
    return library


DATA = np.frombuffer(b"data", np.uint8)


def test_replies_to_one_asker_leave_through_one_endpoint_until_it_dies(library):
    post = ucx.UcxPost()
    for _ in range(2):
        post.reply(b"a", DATA, TAG)
    assert [endpoint.sent for endpoint in library.made] == [[(b"data", TAG)] * 2]
    library.made[0].alive = False
    post.reply(b"a", DATA, TAG)
    assert len(library.made) == 2


def test_askers_are_bounded_and_the_oldest_makes_way(library, monkeypatch):
    monkeypatch.setattr(ucx, "MAX_ASKERS", 2)
    post = ucx.UcxPost()
    for address in (b"a", b"b", b"c"):
        post.reply(address, DATA, TAG)
    assert [endpoint.closed for endpoint in library.made] == [1, 0, 0]
    post.close()
    assert [endpoint.closed for endpoint in library.made] == [1, 1, 1]


def test_what_is_not_for_us_or_too_long_is_received_as_nothing(library):
    post, room = ucx.UcxPost(), np.zeros(16, np.uint8)
    library.arrived = [(TAG, 16), (TAG + 1, 16), (TAG, 17)]
    assert [post.arrival(room, TAG) for _ in range(4)] == [
        ("handle", 16),
        ("handle", 0),
        ("handle", 0),
        None,
    ]
    assert library.received == [16, 0, 0]


def test_a_line_that_was_closed_is_dead_whatever_ucx_says(library):
    line = ucx.UcxPost().dial(b"there")
    assert line.alive and line.address == b"here"
    line.close()
    line.close()
    assert library.made[0].alive and library.made[0].closed == 1
    assert not line.alive


def test_an_address_that_ucx_refuses_is_a_transport_error(library):
    post = ucx.UcxPost()
    with pytest.raises(TransportError, match="UCX: no"):
        post.dial(b"bad")
    with pytest.raises(TransportError, match="UCX: no"):
        post.reply(b"bad", DATA, TAG)
