"""Network ports for tests."""

import socket


def free_port() -> int:
    """Returns a port of this machine on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
