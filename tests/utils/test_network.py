"""Addresses and ports of this machine."""

from __future__ import annotations

import os
import socket
import tempfile

import pytest

from verl.utils.network import (
    LOOPBACK,
    address_towards,
    free_port,
    key_from_environment,
    proxy_exceptions,
    socket_folder,
)


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:8000", "http://localhost:8000"])
def test_this_machine_is_reached_by_the_loopback_address(url):
    assert address_towards(url) == LOOPBACK


def test_a_free_port_can_be_bound():
    port = free_port()
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port))
        assert listener.getsockname() == (LOOPBACK, port)


def test_proxy_exceptions_keep_what_is_set(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org, 10.0.0.1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    text = "example.org,10.0.0.1,127.0.0.1,localhost,::1"
    assert proxy_exceptions() == {"no_proxy": text, "NO_PROXY": text}


def test_a_temporary_folder_with_a_long_path_holds_no_sockets(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/job-7")
    assert socket_folder() == "/scratch/job-7"
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/" + 60 * "a")
    assert socket_folder() == "/tmp"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="got TMPDIR /scratch/a.*; set TMPDIR to a shorter one"):
        socket_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/ray/" + 60 * "b")
    with pytest.raises(ValueError, match="set RAY_TMPDIR to a shorter one"):
        socket_folder()


def test_a_key_is_read_from_a_variable_that_is_set(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k")
    assert (key_from_environment("SOME_KEY", "a"), key_from_environment(None, "a")) == ("k", "")
    monkeypatch.setenv("SOME_KEY", "")
    with pytest.raises(ValueError, match="need the key of the judge in .* SOME_KEY, which is not set"):
        key_from_environment("SOME_KEY", "the judge")
