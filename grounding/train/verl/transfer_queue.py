"""Restrict verl's TransferQueue to processes of the same job: all its sockets use ZeroMQ's CURVE with a key of the job.

Its servers unpickle all input, and listen on the pod's address. CURVE requires a handshake before the first message, and a client needs the
server's public key for it. Here that key is secret: its pair is derived from the job's token (`RAY_AUTH_TOKEN`), which only processes of
the job have. The messages are also encrypted.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
from dataclasses import dataclass, field
from typing import Any

import transfer_queue.controller as queue_controller
import transfer_queue.storage.managers.base as queue_manager
import transfer_queue.storage.simple_storage as queue_storage
import transfer_queue.utils.zmq_utils as queue_sockets
import zmq
import zmq.utils.z85 as z85

from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches

TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105  # the variable's name
SHORTEST = 16
"""Minimum length of a job's token in characters"""


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in ZeroMQ's text format (Z85, 40 bytes each)."""

    public: bytes
    secret: bytes = field(repr=False)


def pair_of_job(token: str) -> KeyPair:
    """Return the key pair that all servers of a job share. Pure. Raises `RuntimeError` if the token is missing or too short to be secret."""
    if len(token) < SHORTEST:
        raise RuntimeError(
            f"{TOKEN} has {len(token)} characters; TransferQueue needs a token of at least {SHORTEST} characters"
        )
    secret = z85.encode(hmac.digest(token.encode(), b"transfer queue: key pair of the servers", hashlib.sha256))
    return KeyPair(zmq.curve_public(secret), secret)


@functools.cache
def _pair_of_process() -> KeyPair:
    """Return the key pair of this process as a client; it is new in each process."""
    return KeyPair(*zmq.curve_keypair())


_create_socket = queue_sockets.create_zmq_socket


def create_locked_socket(ctx: Any, socket_type: Any, ip: str, identity: Any = None) -> Any:
    """Create a socket for TransferQueue that only talks to sockets of this job: a ROUTER as the server, any other type as its client.

    A server's actor may run our code first in its process, so patch the other code that creates sockets there now.
    """
    apply()
    job = pair_of_job(os.environ.get(TOKEN, "").strip())
    made = _create_socket(ctx, socket_type, ip, identity)
    if socket_type == zmq.ROUTER:
        own = job
        made.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        own = _pair_of_process()
        made.setsockopt(zmq.CURVE_SERVERKEY, job.public)
    made.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    made.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    return made


PATCHES = (
    Patch(
        queue_sockets,
        "create_zmq_socket",
        create_locked_socket,
        "TransferQueue unpickles anything that is sent to its ports.",
        "tests/stack/test_transfer_queue.py::test_transfer_queue_still_needs_it fails.",
        "f430008da266",
        also=(queue_controller, queue_storage, queue_manager),
    ),
)


def apply() -> None:
    """Apply the patch."""
    apply_patches(PATCHES)
