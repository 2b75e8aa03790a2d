"""What a peer's transport says of itself in its hello: hostile until decoded."""

from typing import TypeVar

import msgspec

from kvconnect.errors import TransportError

Hello = TypeVar("Hello")


def read_hello(name: str, hello: bytes, schema: type[Hello]) -> Hello:
    """The hello of peer ``name``; raises TransportError, whatever the bytes are."""
    try:
        return msgspec.msgpack.decode(hello, type=schema)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise TransportError(f"peer {name}: its hello is malformed: {e}") from e
