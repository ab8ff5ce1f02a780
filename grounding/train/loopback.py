"""Make a training on one node listen only on this machine's loopback address.

Ray, verl's TransferQueue (which unpickles its input) and torch's stores otherwise listen on every address of the machine or pod, and
execute code that anyone sends.

- Ray's daemons and workers, TransferQueue and verl's servers ask Ray for the node's address. If Ray (2.60) is set not to form a
  cluster, it uses and binds to 127.0.0.1. If 127.0.0.1 is given as its address, it uses the node's address instead.
- torch's `TCPStore`, the rendezvous of the ranks, binds to all addresses (torch 2.11), so it gets a socket that is already bound. Remove
  this once torch binds to the given address; the test of this patch will then fail.
- Gloo and NCCL use the interface `lo`.
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
    """Return the environment variables to add for a training on one node, without those that the user has set. Pure."""
    return {name: value for name, value in VARIABLES.items() if name not in environ}


def torch_modules() -> tuple[Any, ...]:
    """Return the modules in which torch creates the stores of `init_process_group` and of torchrun. They are imported by their full name,
    because a function with the same name hides the first one.
    """
    names = ("torch.distributed.rendezvous", "torch.distributed.elastic.rendezvous.static_tcp_rendezvous")
    return tuple(importlib.import_module(name) for name in names)


def keep_stores_here() -> None:
    """Restrict torch's stores on this machine's own address to connections from this machine. Raises `RuntimeError` if torch has
    changed.
    """
    from torch.distributed import TCPStore

    if "master_listen_fd" not in str(TCPStore.__init__.__doc__):
        raise RuntimeError("this version of torch has no TCPStore(master_listen_fd=...); torch 2.11 has it")
    for module in torch_modules():
        if not hasattr(module, "TCPStore"):
            raise RuntimeError(f"this version of torch creates no TCPStore in {module.__name__}; torch 2.11 does")
        module.TCPStore = store


def store(
    host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *args: Any, **named: Any
) -> Any:
    """Return torch's TCPStore for the same arguments. If it is the server on this machine's own address, other machines cannot
    connect.
    """
    from torch.distributed import TCPStore

    if is_master and host_name in (ADDRESS, "localhost") and "master_listen_fd" not in named:
        listening = socket.socket()
        try:
            # like torch, allow a port that still has a lingering connection
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((ADDRESS, port))
        except OSError:  # this process may already serve the port and share the server (multi_tenant); otherwise torch reports the problem
            listening.close()
        else:
            named["master_listen_fd"] = listening.detach()
    return TCPStore(host_name, port, world_size, is_master, *args, **named)
