"""A lock file in two parts, heavy.txt and rest.txt, without its comments: split.py LOCK FOLDER

Heavy is what changes seldom and weighs most: torch and what CUDA brings. Locks that name the same of it give the same heavy.txt, hence one layer for
all images that have it.
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
