"""Random pairs of a failpoint and a fault over the whole pipeline, each compared with an undisturbed run. `make test-faults` prints the
count.

A trial is a job of several attempts. In each of the first ones a process is killed, its disk fails or is full, or the
power is cut, at a place that an undisturbed run visits; in between the job may move to a node with an empty disk. The
last attempts run undisturbed, and weights, curve and table must equal the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import way
from disk import Disk, why_not

from grounding import failpoints
from grounding.storage import open_store


def in_child(call: Callable[[], None], **environ: str) -> int:
    """Run `call` in a forked process with these variables; return its exit code, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.environ.update(environ)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            call()
        except OSError:
            os._exit(1)  # the fault was reported as an error, which is right
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class Places:
    """Places between two writes, as NAME@COUNT for each visit: in the first attempt, and in a later one on an empty disk."""

    first: tuple[str, ...]
    later: tuple[str, ...]

    def of(self, attempt: int) -> tuple[str, ...]:
        """Return the places from which a fault of this attempt is drawn."""
        return self.first if attempt == 1 else (*self.first, *self.later)


def places(folder: Path, uri: str) -> Places:
    """Run two attempts without a fault, the second on an empty disk, and return the failpoints that each reaches."""
    store, found = open_store(uri), []
    for number, node in enumerate(("out", "elsewhere"), 1):  # a restore happens only if the disk is empty
        trace = folder / f"trace-{number}"
        run = functools.partial(way.attempt, folder / node, uri)
        assert in_child(run, EGM_FAILPOINTS_TRACE=str(trace), EGM_ATTEMPT=str(number)) == 0
        names = Counter(line.partition(":")[0] for line in trace.read_text().splitlines())
        found.append(tuple(f"{name}@{count + 1}" for name, many in sorted(names.items()) for count in range(many)))
        for entry in list(store.entries("model/")) if number == 1 else ():
            store.delete(entry.name)
    return Places(*found)


def trial(folder: Path, uri: str, known: Places, wanted: object, chance: random.Random, cuts: bool) -> Counter[str]:
    """Run one trial; return the number of faults of each kind. Raises `AssertionError` with the steps of the trial."""
    disk = Disk(folder) if cuts else None
    node = disk.path if disk else folder / "node"
    out, done, faults = node / "job", [], Counter[str]()
    if disk:
        failpoints.on_cut(disk.cut)
    try:
        for number in range(1, 9):
            action = chance.choice(["kill", "kill", "error", "full", *(["cut"] * 4 if disk else [])])
            rule = f"{chance.choice(known.of(number))}={action}" if number <= chance.choice([1, 2, 3]) else ""
            code = in_child(lambda: way.attempt(out, uri), EGM_FAILPOINTS=rule, EGM_ATTEMPT=str(number))
            done.append(f"{rule or 'undisturbed'} -> {code}")
            if rule:
                # a failed upload is tried again; a later attempt may not visit the place any more
                faults[action if code else f"{action}, passed{'' if number == 1 else ' or not reached'}"] += 1
            assert code in (0, 1, -9) and (rule or code == 0), done
            if disk and code == -9 and rule.endswith("=cut"):
                disk.again()
            if code and chance.random() < 0.3:
                shutil.rmtree(out, ignore_errors=True)  # the next attempt is on another node
                done.append("another node")
            if code == 0 and not rule:
                break
        found = way.look(out, uri, folder / "copy")
        assert found == wanted, (done, found, wanted)
        return faults
    finally:
        if disk:
            disk.close()


def run(count: int, seed: int, cuts: bool, stores: str = "") -> Counter[str]:
    """Run `count` trials; return how many faults there were, by kind. `stores`: URI below which each trial has its store."""
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="egm-faults-") as name:
        root = Path(name)
        stores = stores or str(root / "stores")
        (root / "plain").mkdir()
        known = places(root / "plain", f"{stores}/plain")
        wanted = way.look(root / "plain" / "elsewhere", f"{stores}/plain", root / "plain" / "copy")
        assert wanted["curve"] and wanted["weights"] == wanted["sent"]
        for number in range(count):
            folder = root / str(number)
            folder.mkdir()
            chance = random.Random(seed * 1_000_003 + number)
            kinds += trial(folder, f"{stores}/{number}", known, wanted, chance, cuts)
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{len({*known.first, *known.later})} places between two writes")
    return kinds


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start the S3 server of tests/conftest.py; yield the URI of a bucket."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import KEY, SECRET, S3Server

    with tempfile.TemporaryDirectory(prefix="egm-s3-") as folder:
        server = S3Server(Path(folder))
        os.environ |= {"AWS_ENDPOINT_URL_S3": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
        try:
            server.make_bucket("faults")
            yield "s3://faults"
        finally:
            server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=200, help="trials")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--s3", action="store_true", help="with a real S3 server as the store, instead of a folder")
    asked = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"no power cut is simulated: {reason}")
    with s3_server() if asked.s3 else contextlib.nullcontext("") as stores:
        kinds = run(asked.n, asked.seed, not reason, stores)
    print(", ".join(f"{kind}: {many}" for kind, many in sorted(kinds.items())))
    struck = sum(many for kind, many in kinds.items() if "," not in kind)
    print(
        f"{asked.n} trials, {kinds.total()} random faults, of which {struck} ended an attempt: "
        "weights, curve and table equal the undisturbed run's in all of them"
    )
