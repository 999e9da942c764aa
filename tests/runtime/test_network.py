"""Tests that a missing network is found at once, and nothing is decided where a proxy may help."""

import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distill.runtime import network


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The addresses that were tried, on a machine without a network."""
    addresses = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        addresses.append(address)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    for scheme in ("http", "https", "all"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(HF_HUB_OFFLINE=False))
    network.find_hub.cache_clear()
    yield addresses
    network.find_hub.cache_clear()


def are_offline() -> list[bool]:
    names = ("huggingface_hub.constants", "datasets.config")
    return [sys.modules[name].HF_HUB_OFFLINE for name in names]


def test_the_hubs_clients_are_told_that_there_is_no_network(tried: list[Any]) -> None:
    network.find_hub()
    network.find_hub()
    assert tried == [("huggingface.co", 443)] and are_offline() == [True, True]


def test_a_mirror_is_tried_in_the_hubs_place(tried: list[Any], monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.local:8080")
    network.find_hub()
    assert tried == [("mirror.local", 8080)]


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HF_HUB_OFFLINE"])
def test_proxies_and_offline_users_are_left_alone(tried: list[Any], monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "http://proxy:1")
    network.find_hub()
    assert not tried and are_offline() == [False, False]


def test_a_hub_that_answers_is_used(tried: list[Any], monkeypatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: SimpleNamespace(close=lambda: None))
    network.find_hub()
    assert are_offline() == [False, False]
