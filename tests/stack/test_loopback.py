"""Ray with verl's TransferQueue as `egm run` starts it on one node: none of its processes can be reached from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grounding.train.rl.run import _own_ray

pytestmark = [pytest.mark.train, pytest.mark.timeout(300)]
CODE = """
import json, sys
import psutil, ray
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1], object_store_memory=80_000_000)
from transfer_queue.storage.simple_storage import SimpleStorageUnit
unit = SimpleStorageUnit.remote({"total_storage_size": 8, "num_data_storage_units": 1, "run_id": "x", "_run_id": "x"})
at = ray.get(unit.get_zmq_server_info.remote())
names = {}
for process in psutil.process_iter(["environ", "name"]):
    if (process.info["environ"] or {}).get("EGM_RAY_NODE") == sys.argv[2]:
        for each in process.net_connections(kind="inet"):
            if each.status == "LISTEN":
                names.setdefault(each.laddr.ip, []).append(process.info["name"])
print(json.dumps([at.ip, names]))
ray.shutdown()
"""


def listeners(folder: Path, mark: str, env: dict[str, str]) -> tuple[str, dict[str, list[str]]]:
    """Return the addresses of TransferQueue, and all listening processes with their addresses."""
    command = [sys.executable, "-c", CODE, str(folder), mark]
    done = subprocess.run(
        command, env={**os.environ, **env, "EGM_RAY_NODE": mark}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    where, names = json.loads(done.stdout.splitlines()[-1])
    return where, names


def test_ray_and_transfer_queue_listen_on_this_machine_only() -> None:
    # Ray's socket files need a short path
    where, names = listeners(Path(f"/tmp/egm-lo-{os.getpid()}"), "kept-here", _own_ray({}))
    assert where == "127.0.0.1"
    assert sum(map(len, names.values())) > 5, names
    assert {ip.removeprefix("::ffff:") for ip in names} == {"127.0.0.1"}, names
