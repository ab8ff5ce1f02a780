"""verl's TransferQueue answers only processes of the same job: every socket of it speaks ZeroMQ's CURVE with a key of the job's own.

Its servers unpickle what reaches them, and listen on the address of the pod. With CURVE a handshake comes before the first message, and none begins
without the server's public key. That key is a secret here: it belongs to a pair that is derived from the job's token (`RAY_AUTH_TOKEN`), which every
process of the job has and no one else. What is sent is encrypted as well.
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
"""Characters that a job's token has at least"""


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in ZeroMQ's own text form (Z85, 40 bytes each)."""

    public: bytes
    secret: bytes = field(repr=False)


def pair_of_job(token: str) -> KeyPair:
    """Return the pair that all servers of a job share. Pure. Raises `RuntimeError` for a token that is missing or too short to keep a secret."""
    if len(token) < SHORTEST:
        raise RuntimeError(f"{TOKEN} has {len(token)} characters; TransferQueue needs a token of {SHORTEST} at least")
    secret = z85.encode(hmac.digest(token.encode(), b"transfer queue: key pair of the servers", hashlib.sha256))
    return KeyPair(zmq.curve_public(secret), secret)


@functools.cache
def _pair_of_process() -> KeyPair:
    """Return the pair by which this process is a client; a new one in each process."""
    return KeyPair(*zmq.curve_keypair())


_create_socket = queue_sockets.create_zmq_socket


def create_locked_socket(ctx: Any, socket_type: Any, ip: str, identity: Any = None) -> Any:
    """Create a socket as TransferQueue does, which talks to sockets of this job only: a ROUTER as the server, any other as its client.

    A server's actor may be the first of ours in its process, so what else makes sockets there is patched now.
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
        "TransferQueue unpickles what anyone sends to its ports.",
        "tests/stack/test_transfer_queue.py::test_transfer_queue_still_needs_it fails.",
        "f430008da266",
        also=(queue_controller, queue_storage, queue_manager),
    ),
)


def apply() -> None:
    """Apply the patch."""
    apply_patches(PATCHES)
