"""What `messages` needs of a library that sends and receives tagged messages.

A post has one address that requests go to, and a line per peer to ask through. Nothing blocks.
Data is a numpy array of bytes; it belongs to the library until its handle is completed.
"""

from typing import Protocol

import numpy as np


class Handle(Protocol):
    """A message on its way. The library has its memory until it is completed."""

    @property
    def completed(self) -> bool: ...

    @property
    def status(self) -> int:
        """0 if all went well; valid once completed."""


class RequestLine(Protocol):
    """To ask one peer through. Raises TransportError when it cannot do what it is told."""

    address: bytes
    """Where replies are to go."""

    @property
    def alive(self) -> bool: ...

    def progress(self) -> None: ...

    def send(self, data: np.ndarray, tag: int) -> Handle: ...

    def receive(self, room: np.ndarray, tag: int) -> Handle: ...

    def close(self) -> None:
        """Its handles are completed. Idempotent."""


class Post(Protocol):
    """The library."""

    address: bytes
    """Where requests are to go."""

    def dial(self, address: bytes) -> RequestLine:
        """Raises TransportError if it is no address."""

    def arrival(self, room: np.ndarray, tag: int) -> tuple[Handle, int] | None:
        """Receive a request: its size, 0 if it has another tag or is larger than the room.

        None if there is none. Makes progress.
        """

    def reply(self, address: bytes, data: np.ndarray, tag: int) -> Handle:
        """Send to a line's address; raises TransportError."""

    def hang_up(self, address: bytes) -> None:
        """Replies to this line are completed."""

    def close(self) -> None: ...
