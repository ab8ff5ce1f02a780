"""Shares the GPUs of this machine among jobs that run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from grounding.roles import Role


def gpus_of(roles: Sequence[Role]) -> int:
    """GPUs that a job holds while it runs."""
    return sum(r.gpus * r.replicas for r in roles)


def machine_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, from CUDA_VISIBLE_DEVICES or the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [v.strip() for v in visible.split(",") if v.strip() and v.strip() != "-1"]
    return sorted((p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*")), key=int)


class Gpus:
    """Hands out GPU ids to jobs that run at the same time; a job waits until there are enough."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.total, self._free, self._changed = len(ids), list(ids), asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[list[str]]:
        """Hold `count` GPUs."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            mine, self._free = self._free[:count], self._free[count:]
        try:
            yield mine
        finally:
            self._free += mine
            async with self._changed:
                self._changed.notify_all()
