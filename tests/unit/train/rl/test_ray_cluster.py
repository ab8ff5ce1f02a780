"""While rank 0 connects to Ray and after it has disconnected, SIGTERM is a request to stop, and does not end the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from grounding.errors import Failure
from grounding.runtime.grace import Stop
from grounding.train.rl import ray_cluster

SCRIPT = """
import os, signal
import ray
from grounding.runtime.grace import Stop
from grounding.train.rl.ray_cluster import _own_sigterm

def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    stop.asked_at = None

stop = Stop(60.0)
signal.signal(signal.SIGTERM, stop.ask)
with _own_sigterm(stop):
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
ask()
with _own_sigterm(stop):
    ray.shutdown()
ask()
"""


def test_the_real_ray_leaves_sigterm_to_the_role() -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_USAGE_STATS_ENABLED": "0"
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stop() -> Iterator[Stop]:
    """Return a `Stop` that SIGTERM of this process triggers while the test runs."""
    made, before = Stop(60.0), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, made.ask)
    yield made
    signal.signal(signal.SIGTERM, before)


def test_sigterm_in_the_meantime_is_a_request_to_stop(stop: Stop) -> None:
    def connect() -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Failure, match="asked to stop"), ray_cluster._own_sigterm(stop):
        connect()
    assert stop.asked
