"""Run the benchmarks that compare this project with what one would otherwise use, and that need no special machine: `make bench`.

    python bench/side_by_side.py [--only NAME ...] [--out FOLDER]

Each comparison runs both sides alternately in one run and prints JSON; the parts' own descriptions say what they compare. One after the
other, each result is written to FOLDER/NAME.json (by default .cache/bench) together with the machine, the commit and the machine's load
before and after, without which a figure cannot be judged. `--out bench/results` (`make bench RECORD=1`) records them: `make docs`
writes the tables of docs/benchmarks.md from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = {
    "scoring": ("bench/scoring.py",),
    "reward": ("bench/reward.py",),
    "prepare": ("bench/data/prepare.py",),
    "data_queue": ("bench/data_queue.py",),
    "storage": ("bench/storage.py",),
    "client": ("bench/evaluate", "--quick", "--only", "client", "--out", "{out}"),
}
"""Name -> arguments of Python. A command with {out} writes its JSON there; the others print it."""
LAST_LINES = 5
"""Number of lines to show of an output that is no JSON"""


def machine() -> dict[str, str | int | float]:
    """Return what a reader must know about this machine: processor, usable cores, memory in GiB, versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    versions = {"system": platform.platform(), "python": platform.python_version()}
    return {"processor": model, "cores": cores, "memory_gib": round(memory, 1), **versions}


def commit() -> str:
    """Return the checkout's commit, with `+changes` if tracked files other than results differ from it; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return ""
    status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!bench/results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def parsed(text: str) -> object | None:
    """Return the JSON of a comparison; None if the text is no JSON."""
    try:
        found: object = json.loads(text)
    except ValueError:
        return None
    return found


def measured(name: str, arguments: Sequence[str], out: Path) -> str:
    """Run one comparison and write its result to `out`; return why it failed, or an empty text. A failed one leaves no result."""
    own = out.with_suffix(".part")
    words = [sys.executable, *(word.format(out=own) for word in arguments)]
    for earlier in (own, out):
        earlier.unlink(missing_ok=True)
    before, began, head = os.getloadavg()[0], time.time(), commit()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace")
    took = time.time() - began
    text = own.read_text(encoding="utf-8", errors="replace") if own.exists() else done.stdout
    own.unlink(missing_ok=True)
    if done.returncode:
        return f"exit code {done.returncode}, see above"
    result = parsed(text)
    if result is None:
        last = "".join(f"\n  {line[:200]}" for line in text.splitlines()[-LAST_LINES:])
        return f"expected JSON, found {f'other output, which ends with:{last}' if last else 'no output'}"
    facts = {
        "name": name,
        "command": ["python", *arguments],
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(took, 1),
        "load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "commit": head,
        "machine": machine(),
        "result": result,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen comparisons; the exit code is 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "bench", help="folder of the results")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    if load > 0.5 * len(os.sched_getaffinity(0)):
        print(f"note: the load of this machine is {load:.1f}; ratios are reliable only if it is idle", flush=True)
    failed = []
    for number, name in enumerate(given.only, 1):
        print(f"{number}/{len(given.only)} {name}: python {' '.join(COMPARISONS[name])}", flush=True)
        began = time.monotonic()
        why = measured(name, COMPARISONS[name], given.out / f"{name}.json")
        where = f"failed: {why}" if why else given.out / f"{name}.json"
        print(f"{number}/{len(given.only)} {name}: {time.monotonic() - began:.0f} s, {where}", flush=True)
        failed += [name] if why else []
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
