"""Addresses and ports of this machine."""

from __future__ import annotations

import socket

import pytest

from verl.utils.network import LOOPBACK, address_towards, free_port


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:8000", "http://localhost:8000"])
def test_this_machine_is_reached_by_the_loopback_address(url):
    assert address_towards(url) == LOOPBACK


def test_a_free_port_can_be_bound():
    port = free_port()
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port))
        assert listener.getsockname() == (LOOPBACK, port)
