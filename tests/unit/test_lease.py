"""What `LeaseBook` does with request ids that are used again; the rest is in the lease machine."""

from dataclasses import replace

import pytest

from kvconnect.lease import LeaseBook, LeaseState, Terms
from kvconnect.testing import FakeClock


@pytest.fixture
def book():
    return LeaseBook(FakeClock(), max_duration_s=60)


def terms(lease_id):
    return Terms("r", lease_id, ((1,),), 1, b"digest", ttl_s=10)


def test_a_request_id_leads_to_its_latest_generation(book):
    book.grant(terms("g1"))
    book.promise("r", "g2")
    assert book.find("r") == "g2"
    assert book.standing("g1") is LeaseState.GRANTED
    assert book.close("g1", "reader", 0, 1) == (True, "r")
    assert book.find("r") == "g2", "the end of an older lease hid the newer one"


def test_the_withdrawal_of_an_older_promise_does_not_hide_a_newer_one(book):
    book.promise("r", "g1")
    book.promise("r", "g2")
    book.withdraw("g1")
    assert book.find("r") == "g2"
    book.withdraw("g2")
    assert book.find("r") is None


def test_a_granted_lease_cannot_be_withdrawn(book):
    book.grant(terms("g1"))
    book.withdraw("g1")
    assert book.standing("g1") is LeaseState.GRANTED


def test_leases_of_one_name_are_found_by_their_requests_too(book):
    for request_id in "ab":
        book.promise("name", request_id * 3)
        book.grant(replace(terms(request_id * 3), request_id=request_id, name="name"))
    assert [book.find(name) for name in ("a", "b", "name")] == ["aaa", "bbb", "bbb"]
    book.revoke("bbb")
    assert [book.find(name) for name in ("a", "b", "name")] == ["aaa", None, None]
    assert book.is_over("name")
    assert book.is_over("b"), "who asks for it waits for nothing"
    assert not book.is_over("a")
