"""Share the GPUs of this machine among jobs that run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from grounding.roles import Role


def users_of(server: Role, roles: Sequence[Role]) -> frozenset[str]:
    """Return the tasks that use a server. The server is stopped after the last of them."""
    return frozenset(r.name for r in roles if r.kind == "task" and server.name in r.after)


def _before(role: Role, roles: Sequence[Role]) -> set[str]:
    """Return the roles that have ended when `role` starts: the tasks before it, and servers that only those tasks use."""
    by_name = {r.name: r for r in roles}
    ended: set[str] = set()
    todo = list(role.after)
    while todo:
        other = by_name.get(todo.pop())
        if other is None:  # `egm serve` starts a server without the roles before it
            continue
        if other.kind == "task" and other.name not in ended:
            ended.add(other.name)
        todo += other.after
    return ended | {r.name for r in roles if r.kind == "server" and (u := users_of(r, roles)) and u <= ended}


def gpus_of(roles: Sequence[Role]) -> int:
    """Return the number of GPUs that a job occupies: the most that its roles need at the same time."""
    before = {r.name: _before(r, roles) for r in roles}
    return max(
        (
            sum(
                o.gpus * o.replicas
                for o in roles
                if o.name not in before[role.name] and role.name not in before[o.name]
            )
            for role in roles
        ),
        default=0,
    )


def machine_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use, from CUDA_VISIBLE_DEVICES or the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [v.strip() for v in visible.split(",") if v.strip() and v.strip() != "-1"]
    return sorted((p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*")), key=int)


class Gpus:
    """Assigns GPU ids to concurrent jobs; a job waits until enough are free."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.total, self._free, self._changed = len(ids), list(ids), asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[list[str]]:
        """Reserve `count` GPUs while the block runs, and yield their ids."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            mine, self._free = self._free[:count], self._free[count:]
        try:
            yield mine
        finally:
            self._free += mine
            async with self._changed:
                self._changed.notify_all()
