"""Measure the cost of encrypting TransferQueue's messages: requests between two of its sockets, with and without the lock, alternately.

    python bench/data_queue.py [--rounds 5]

Both ends share this machine's cores, so only the ratio of the two, and its change with the size, apply to other machines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import transfer_queue.utils.zmq_utils as queue_sockets
import zmq

from grounding.train.verl.transfer_queue import TOKEN, create_locked_socket

ADDRESS = "127.0.0.1"
SIZES = {"answer, 64 kB": (1 << 16, 100), "small picture, 1 MB": (1 << 20, 40), "picture, 8 MB": (1 << 23, 10)}
"""Bytes of a request, and number of requests in a round"""


def seconds_a_request(make: Callable[..., Any], size: int, count: int) -> float:
    """Return the mean seconds of a request of `size` bytes and its short answer."""
    here, there = zmq.Context(), zmq.Context()
    server, client = make(there, zmq.ROUTER, ADDRESS), make(here, zmq.DEALER, ADDRESS)
    client.connect(f"tcp://{ADDRESS}:{server.bind_to_random_port(f'tcp://{ADDRESS}')}")
    payload = memoryview(bytearray(size))

    def serve() -> None:
        for _ in range(count + 1):
            identity, *_ = server.recv_multipart(copy=False)
            server.send_multipart([identity, b"kept"])

    thread = threading.Thread(target=serve)
    thread.start()
    began = 0.0
    for number in range(count + 1):
        if number == 1:  # the first request sets up the connection
            began = time.perf_counter()
        client.send_multipart([b"header", payload], copy=False)
        client.recv_multipart()
    took = time.perf_counter() - began
    thread.join()
    here.destroy(0)
    there.destroy(0)
    return took / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ.setdefault(TOKEN, "a token for the benchmark")
    plain = queue_sockets.create_zmq_socket
    found: dict[str, dict[str, float]] = {}
    for name, (size, count) in SIZES.items():
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for taken, make in zip(both, (plain, create_locked_socket), strict=True):
                taken.append(seconds_a_request(make, size, count))
        without, locked = (statistics.median(taken) for taken in both)
        found[name] = {
            "ms": round(1e3 * without, 3),
            "ms locked": round(1e3 * locked, 3),
            "MB/s locked": round(size / 1e6 / locked),
        }
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), "rounds": rounds, "requests": found}, indent=1))


if __name__ == "__main__":
    main()
