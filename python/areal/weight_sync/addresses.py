"""Which addresses this machine has, as seen from a rollout server; nothing here imports torch."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def local_address(host: str, port: int) -> str:
    """The address of this machine by which ``host`` can reach it: loopback for a server on this machine."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing; the kernel chooses the interface
        return str(probe.getsockname()[0])


def is_here(url: str) -> bool:
    """Whether a server runs on this machine: only its own addresses can be bound."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, 0, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found[:1]:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError:
        return False
    return bool(found)
