"""A client without the key connects to the installed TransferQueue in a real Ray cluster: its data is never unpickled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.train, pytest.mark.timeout(600)]
TOKEN = "a token that only the job has"
QUEUE = """
import json, sys, time
from pathlib import Path
if sys.argv[2] == "locked":
    from grounding.train.verl import transfer_queue
    transfer_queue.apply()
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
for left in (2, 1, 0):  # Ray gives itself 30 s to start, which is too little on a busy machine
    try:
        ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1], object_store_memory=80_000_000)
        break
    except Exception:
        ray.shutdown()
        if not left:
            raise
conf = tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
units = conf.backend.SimpleStorage.zmq_info.values()
servers = [*units, conf.controller.zmq_info]
print(json.dumps([f"tcp://{s.ip}:{port}" for s in servers for port in s.ports.values()]), flush=True)
sys.stdin.readline()
tq.kv_put("first", partition_id="some", fields={"ids": torch.arange(5)}, tag={"n": 1})
found = tq.kv_batch_get(["first"], partition_id="some")
print(json.dumps(found["ids"].unbind()[0].tolist()), flush=True)
tq.close()
ray.shutdown()
"""
STRANGER = """
import pickle, sys
import zmq

class Code:
    def __reduce__(self):
        return (open, (sys.argv[1], "w"))

def knock(address, **locks):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"TQ_STORAGE_stranger")
    for name, value in locks.items():
        setattr(socket, name, value)
    socket.connect(address)
    socket.send_multipart([b"\\xc1\\xfe\\xed", pickle.dumps(Code())])
    if socket.poll(1500):
        print("answer", socket.recv_multipart()[0][:80], flush=True)
    context.destroy(linger=0)

for address in sys.argv[2:]:
    knock(address)
    public, secret = zmq.curve_keypair()
    knock(address, curve_serverkey=zmq.curve_keypair()[0], curve_publickey=public, curve_secretkey=secret)
    knock(address, plain_username=b"admin", plain_password=b"admin")
"""


def attacked(folder: Path, mode: str) -> tuple[bool, str, list[int]]:
    """Return whether a stranger's code ran at TransferQueue, the reply that they got, and the data that the job reads afterwards."""
    trace = folder / "code-ran"
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    env = own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        tempfile.TemporaryDirectory(
            prefix="egm-tq-", dir="/tmp", ignore_cleanup_errors=True
        ) as short,  # a short path, for Ray's socket files
        subprocess.Popen(
            [sys.executable, "-c", QUEUE, short, mode],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as job,
    ):
        assert job.stdin and job.stdout
        addresses = json.loads(next(line for line in job.stdout if line.startswith("[")))
        assert len(addresses) == 3, addresses
        command = [sys.executable, "-c", STRANGER, str(trace), *addresses]
        said = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout
        print(file=job.stdin, flush=True)
        read = json.loads(next(line for line in job.stdout if line.startswith("[")))
    assert job.returncode == 0
    return trace.exists(), said, read


def test_a_stranger_s_pickle_is_not_executed_and_the_job_goes_on(tmp_path: Path) -> None:
    assert attacked(tmp_path, "locked") == (False, "", [0, 1, 2, 3, 4])


def test_transfer_queue_still_needs_it(tmp_path: Path) -> None:
    ran, said, _ = attacked(tmp_path, "open")
    assert ran and "answer" in said


def test_without_a_token_no_socket_is_made() -> None:
    code = """
import zmq
from grounding.train.verl import transfer_queue
transfer_queue.create_locked_socket(zmq.Context(), zmq.ROUTER, "127.0.0.1")
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=False)
    assert done.returncode and "RAY_AUTH_TOKEN has 0 characters" in done.stderr


def test_each_job_has_keys_of_its_own() -> None:
    code = """
import zmq
from grounding.train.verl.transfer_queue import pair_of_job
one, other = pair_of_job("a token of 16 ch"), pair_of_job("a token of 17 cha")
assert one == pair_of_job("a token of 16 ch") and one != other
assert one.public == zmq.curve_public(one.secret) and str(one.secret) not in repr(one)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
