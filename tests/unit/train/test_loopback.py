"""On one node, nothing can be reached from outside the machine: the variables, and torch's real stores."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest

from grounding.train import loopback
from grounding.train.rl import run as rl
from grounding.train.sft.torchrun import launcher

torch_distributed = pytest.importorskip("torch.distributed")


def listening() -> set[tuple[str, int]]:
    """Return the addresses and ports on which this process listens."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(str(fd.readlink()))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            address, _, port = columns[1].rpartition(":")
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                found.add((address, int(port, 16)))
    return found


LOOPBACK = "0100007F"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("libuv", [True, False])
def test_a_store_on_this_machine_is_reached_from_here_only(libuv: bool) -> None:
    before, port = listening(), free_port()
    limit = timedelta(seconds=10)
    made = loopback.store("127.0.0.1", port, 1, True, limit, multi_tenant=True, use_libuv=libuv)
    assert listening() - before == {(LOOPBACK, port)}
    shared = loopback.store("127.0.0.1", port, 1, True, limit, multi_tenant=True, use_libuv=libuv)
    other = loopback.store("127.0.0.1", port, 1, is_master=False, timeout=limit, use_libuv=libuv)
    shared.set("a", "1")
    assert other.get("a") == made.get("a") == b"1" and listening() - before == {(LOOPBACK, port)}


def test_torch_still_needs_it() -> None:
    """This test fails once torch binds to the given address; then `store` can be removed."""
    before, port = listening(), free_port()
    kept = torch_distributed.TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=10))
    assert {address for address, _ in listening() - before} != {LOOPBACK}
    del kept


def test_a_store_for_other_nodes_is_left_alone() -> None:
    before, port = listening(), free_port()
    kept = loopback.store(socket.gethostbyname(socket.gethostname()), port, 1, True, timedelta(seconds=10))
    [(address, found)] = listening() - before
    assert found == port and (address != LOOPBACK or socket.gethostbyname(socket.gethostname()) == "127.0.0.1")
    del kept


def test_the_rendezvous_of_ranks_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous, static = loopback.torch_modules()
    for module in (rendezvous, static):
        monkeypatch.setattr(module, "TCPStore", torch_distributed.TCPStore)
    loopback.keep_stores_here()
    before, port = listening(), free_port()
    url = f"tcp://127.0.0.1:{port}?rank=0&world_size=1"
    kept = next(rendezvous.rendezvous(url, timeout=timedelta(seconds=10)))
    assert listening() - before == {(LOOPBACK, port)}
    del kept
    monkeypatch.delattr(static, "TCPStore")
    with pytest.raises(RuntimeError, match="static_tcp_rendezvous"):
        loopback.keep_stores_here()


def test_one_node_is_kept_to_itself_unless_the_user_says_otherwise() -> None:
    made = rl._own_ray({"GLOO_SOCKET_IFNAME": "eth1"})
    assert made["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and made["NCCL_SOCKET_IFNAME"] == "=lo"
    assert made["GLOO_SOCKET_IFNAME"] == "eth1"


def test_ranks_of_one_node_meet_on_it_and_those_of_several_at_rank_0() -> None:
    given = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert "--master-addr=127.0.0.1" in launcher(given, 8, [])
    assert "--master-addr=127.0.0.1" in launcher({**given, "WORLD_SIZE": "1", "RANK": "0"}, 8, [])
    assert "--master-addr=job-master-0" in launcher({**given, "WORLD_SIZE": "2", "RANK": "1"}, 8, [])
