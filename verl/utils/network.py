"""Addresses and ports of this machine, and its proxies."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")
# A Unix socket has a path of at most 107 bytes (man 7 unix), of which Ray needs up to 69 below the folder.
_MAX_SOCKET_FOLDER = 107 - 69


def proxy_exceptions() -> dict[str, str]:
    """Environment variables by which no program asks a proxy for the loopback interface.

    Programs that look for proxies in the environment take one for every host that `no_proxy` does not name,
    and would send the secret of the run there.
    """
    given = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    text = ",".join(dict.fromkeys([*names, *_LOOPBACK_NAMES]))
    return {"no_proxy": text, "NO_PROXY": text}


def socket_folder() -> str:
    """Folder for temporary files whose path is short enough for Unix sockets in it.

    Raises:
        ValueError: RAY_TMPDIR is too long, or TMPDIR is and /tmp cannot be written.
    """
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _MAX_SOCKET_FOLDER:
        return folder
    if variable == "TMPDIR" and os.access("/tmp", os.W_OK | os.X_OK):
        return "/tmp"
    raise ValueError(
        f"need a folder for temporary files with a path of at most {_MAX_SOCKET_FOLDER} bytes, since paths "
        f"of sockets are limited, got {variable} {folder}; set {variable} to a shorter one"
    )


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


def key_from_environment(variable: str | None, owner: str) -> str:
    """A key in an environment variable; "" if there is no variable.

    Args:
        variable: its name; None: no key is needed.
        owner: of the key, for the message.

    Raises:
        ValueError: the variable is not set.
    """
    if variable is None:
        return ""
    if not os.environ.get(variable):
        raise ValueError(
            f"need the key of {owner} in the environment variable {variable}, which is not set; set it"
        )
    return os.environ[variable]


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a host address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port of an address of this machine that no process listens at."""
    with socket.socket() as free:
        free.bind((address, 0))
        port: int = free.getsockname()[1]
        return port
