"""The endpoint of a role listens on the kind of address that its pod has."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import pytest

from grounding.runtime import endpoint
from grounding.runtime.environment import Environment


class Nothing:
    def answer(self) -> dict[str, Any]:
        return {"step": 3}

    def collect(self) -> Iterable[Any]:
        return ()


def _free_port(family: socket.AddressFamily, address: str) -> int:
    try:
        with socket.socket(family) as found:
            found.bind((address, 0))
            return int(found.getsockname()[1])
    except OSError:
        pytest.skip(f"this machine has no {address}")


@pytest.mark.parametrize(
    ("pod_ip", "family", "own", "asked"),
    [
        ("10.1.2.3", socket.AF_INET, "127.0.0.1", ["127.0.0.1"]),
        ("fd00::17", socket.AF_INET6, "::1", ["[::1]", "127.0.0.1"]),
    ],
)
def test_a_pod_is_asked_by_its_kind_of_address(
    monkeypatch: pytest.MonkeyPatch, pod_ip: str, family: socket.AddressFamily, own: str, asked: list[str]
) -> None:
    port = _free_port(family, own)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "kubernetes")
    for name, value in Environment(pod_ip=pod_ip, progress_port=port).as_environ().items():
        monkeypatch.setenv(name, value)
    with endpoint.listen(Nothing()) as listening:
        assert listening == port
        for host in asked:
            with urllib.request.urlopen(f"http://{host}:{port}/progress", timeout=5) as answer:
                assert answer.read() == b'{"step": 3}'


def test_clients_that_send_nothing_are_ended_by_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CONNECTIONS", 20)
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    before = threading.active_count()
    with endpoint.listen(Nothing()) as port, contextlib.ExitStack() as opened:
        slow = []
        for _ in range(100):
            slow.append(opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)))
            slow[-1].send(b"G")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
            assert answer.read() == b'{"step": 3}'
        for each in slow[:80]:
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b"", "the oldest connections should be closed"
        end = time.monotonic() + 5
        while threading.active_count() > before + 22 and time.monotonic() < end:
            time.sleep(0.01)
        assert threading.active_count() <= before + 22, "one thread a connection, and that of the server"
