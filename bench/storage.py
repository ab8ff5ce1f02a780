"""Compare our download of many small files from S3 with boto3's own transfer manager, and with s5cmd if it is on PATH.

    python bench/storage.py [--files 2000] [--size 160000] [--rounds 2]

They run alternately on one server: SeaweedFS on loopback, as in the tests. It shares the machine with its clients, so only ratios are meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig

from grounding.storage import fetch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import KEY, SECRET, S3Server

BUCKET = "bench"


def ours(target: Path) -> None:
    fetch(f"s3://{BUCKET}/pictures", cache=target)


def transfer_manager(target: Path) -> None:
    """List the files, then download each by boto3's managed transfer, ten at a time, as users do."""
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="pictures/")
    keys = [o["Key"] for page in pages for o in page["Contents"]]
    (target / "pictures").mkdir(parents=True)

    def one(key: str) -> None:
        client.download_file(BUCKET, key, str(target / key), Config=TransferConfig(use_threads=False))

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(one, keys))


def s5cmd(target: Path) -> None:
    target.mkdir(parents=True)
    command = ["s5cmd", "--log", "error", "--numworkers", "16", "cp", f"s3://{BUCKET}/pictures/*", f"{target}/"]
    subprocess.run(command, check=True, env={**os.environ, "S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL_S3"]})


def timed(call: Any, folder: Path) -> dict[str, float]:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    call(folder)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(folder)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": took, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--size", type=int, default=160_000, help="Bytes per file.")
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "store").mkdir()
        server = S3Server(work / "store")
        os.environ |= {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL_S3": server.url,
            "AWS_REGION": "us-east-1",
        }
        try:
            client, data = boto3.client("s3"), os.urandom(a.size)
            client.create_bucket(Bucket=BUCKET)
            with ThreadPoolExecutor(8) as pool:
                send = lambda i: client.put_object(Bucket=BUCKET, Key=f"pictures/{i:06}.jpg", Body=data)  # noqa: E731
                list(pool.map(send, range(a.files)))
            calls = {"ours": ours, "boto3_transfer_manager": transfer_manager}
            if shutil.which("s5cmd"):
                calls["s5cmd"] = s5cmd
            runs: dict[str, list[dict[str, float]]] = {n: [] for n in calls}
            for number in range(a.rounds):
                for each, call in calls.items():
                    runs[each].append(timed(call, work / f"{each}-{number}"))
        finally:
            server.kill()
    result: dict[str, Any] = {"files": a.files, "bytes": a.size, "cores": len(os.sched_getaffinity(0))}
    for each, found in runs.items():
        result[each] = {k: round(statistics.median(r[k] for r in found), 2) for k in ("seconds", "cpu")}
    for each in list(runs)[1:]:
        result[f"ours_over_{each}"] = round(result["ours"]["seconds"] / result[each]["seconds"], 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
