"""Rank 0 connects to Ray and keeps its own handler of SIGTERM, which `ray.init` replaces by one that ends the process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
import ray

from grounding.errors import Failure
from grounding.runtime.grace import Stop
from grounding.train.rl import ray_cluster


@pytest.fixture
def stop() -> Iterator[Stop]:
    """Return a `Stop` that SIGTERM of this process triggers while the test runs."""
    made, before = Stop(60.0), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, made.ask)
    yield made
    signal.signal(signal.SIGTERM, before)


def _replace_handler(**_: object) -> None:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))


def _replace_handler_and_fail(**_: object) -> None:
    _replace_handler()
    raise ConnectionError("Ray does not answer")


def _be_stopped(**_: object) -> None:
    _replace_handler()
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("init", [_replace_handler, _replace_handler_and_fail])
def test_sigterm_after_the_connection_is_a_request_to_stop(
    stop: Stop, monkeypatch: pytest.MonkeyPatch, init: object
) -> None:
    monkeypatch.setattr(ray, "init", init)
    if init is _replace_handler:
        ray_cluster._connect("10.0.0.1:6379", stop)
    else:
        with pytest.raises(ConnectionError):
            ray_cluster._connect("10.0.0.1:6379", stop)
    assert not stop.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked


def test_sigterm_during_the_connection_is_a_request_to_stop(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", _be_stopped)
    with pytest.raises(Failure, match="asked to stop"):
        ray_cluster._connect("10.0.0.1:6379", stop)
    assert stop.asked
