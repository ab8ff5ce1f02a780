"""Measure the use of processes: CPU seconds and memory from /proc, requests from the API server's audit log."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory(pid: int) -> dict[str, float]:
    """Return the resident and proportional memory of a process in megabytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    return {"rss_mb": round(found["Rss"] / 1024, 1), "pss_mb": round(found["Pss"] / 1024, 1)}


def control_plane(run: Path) -> dict[str, int]:
    """Return program -> pid for the cluster of this checkout; empty for another cluster."""
    return {p.stem: int(json.loads(p.read_text())["pid"]) for p in sorted((run / "pids").glob("*.json"))}


class Meter:
    """Measures the CPU seconds of several processes between calls of `lap`."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids = pids
        self._before = {name: cpu(pid) for name, pid in pids.items()}

    def lap(self) -> dict[str, float]:
        """Return name -> CPU seconds since the last call."""
        now = {name: cpu(pid) for name, pid in self.pids.items()}
        used = {name: round(now[name] - self._before[name], 3) for name in now}
        self._before = now
        return used


def audited(logs: Path, agent: str, namespace: str) -> dict[str, int] | None:
    """Return the number of requests of a user agent in a namespace by `verb resource/subresource`. None if no audit log has all of them."""
    files = sorted(logs.glob("audit*.log"), key=lambda p: p.stat().st_mtime_ns)
    if not files:
        return None
    wanted, counts = f'"userAgent":"{agent}', Counter[str]()
    for file in files:
        with file.open() as lines:
            for line in lines:
                if wanted not in line:
                    continue
                entry = json.loads(line)
                reference = entry.get("objectRef") or {}
                if reference.get("namespace") == namespace and entry.get("stage") == "ResponseComplete":
                    sub = f"/{reference['subresource']}" if reference.get("subresource") else ""
                    counts[f"{entry['verb']} {reference.get('resource')}{sub}"] += 1
    return dict(counts.most_common())
