"""Split a lock file into two parts without comments, heavy.txt and rest.txt: split.py LOCK FOLDER

heavy.txt has the packages that are largest and rarely change: torch and the CUDA libraries. Locks with the same versions of these give the same
heavy.txt, so their images share one layer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HEAVY = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+)==")

if __name__ == "__main__":
    lock, folder = map(Path, sys.argv[1:])
    parts: dict[str, list[str]] = {"heavy": [], "rest": []}
    part = "rest"
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line.startswith(" "):  # a requirement; its hashes follow, indented
            part = "heavy" if HEAVY.match(line) else "rest"
        parts[part].append(line)
    for name, lines in parts.items():
        target = folder / name / f"{name}.txt"
        target.parent.mkdir(parents=True)
        target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
