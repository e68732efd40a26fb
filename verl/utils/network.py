"""Addresses and ports of this machine."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def address_towards(url: str | None) -> str:
    """Address of this machine by which the host of a URL reaches it; None: the loopback address."""
    if url is None:
        return LOOPBACK
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only asks the routing table.
        probe.connect((parts.hostname or LOOPBACK, parts.port or 80))
        address: str = probe.getsockname()[0]
        return address


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port of an address of this machine that no process listens at."""
    with socket.socket() as free:
        free.bind((address, 0))
        port: int = free.getsockname()[1]
        return port
