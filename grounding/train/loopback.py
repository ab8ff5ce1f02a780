"""Make a training on one node listen only on this machine's own address.

Ray, verl's TransferQueue (which unpickles what it gets) and torch's stores otherwise listen on every address of the machine or pod, and run
code that a stranger sends.

- Ray's daemons and workers, TransferQueue and verl's servers, which ask Ray for the node's address: if Ray (2.60) is told not to form a
  cluster, it calls the node 127.0.0.1 and binds to that. If 127.0.0.1 is given as its address, it uses the node's address instead.
- torch's `TCPStore`, where processes meet: it binds to all addresses (torch 2.11), so it gets a socket that is already bound. Remove this
  once torch binds to the given address; its test will fail then.
- Gloo and NCCL take the interface `lo`.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from typing import Any

ADDRESS = "127.0.0.1"
VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "=lo",
}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add for a training on one node; the user's own values are kept. Pure."""
    return {name: value for name, value in VARIABLES.items() if name not in environ}


def torch_modules() -> tuple[Any, ...]:
    """Return the modules in which torch makes the stores of `init_process_group` and of torchrun. The first one has the same name as a
    function.
    """
    names = ("torch.distributed.rendezvous", "torch.distributed.elastic.rendezvous.static_tcp_rendezvous")
    return tuple(importlib.import_module(name) for name in names)


def keep_stores_here() -> None:
    """Make torch's stores with this machine's own address reachable only from this machine. Raises `RuntimeError` if torch is not as
    expected.
    """
    from torch.distributed import TCPStore

    if "master_listen_fd" not in str(TCPStore.__init__.__doc__):
        raise RuntimeError("this version of torch has no TCPStore(master_listen_fd=...); 2.11 has")
    for module in torch_modules():
        if not hasattr(module, "TCPStore"):
            raise RuntimeError(f"this version of torch makes no TCPStore in {module.__name__}; 2.11 does")
        module.TCPStore = store


def store(
    host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *args: Any, **named: Any
) -> Any:
    """Return torch's TCPStore with the same arguments. If it is the server and has this machine's own address, other machines cannot
    connect.
    """
    from torch.distributed import TCPStore

    if is_master and host_name in (ADDRESS, "localhost") and "master_listen_fd" not in named:
        listening = socket.socket()
        try:
            # like torch: allow a port that still has a lingering connection
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((ADDRESS, port))
        except (
            OSError
        ):  # this process already serves it and shares the server (multi_tenant); otherwise torch reports the problem
            listening.close()
        else:
            named["master_listen_fd"] = listening.detach()
    return TCPStore(host_name, port, world_size, is_master, *args, **named)
