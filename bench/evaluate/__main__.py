"""Run all benchmarks of the evaluation client: `python bench/evaluate [--only client scale death memory fleet] [--quick] [--against TREE]`.

The results are written to `bench/evaluate/results.json`; parts that are not run keep their earlier results. docs/benchmarks.md describes them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import client  # noqa: E402
import fleet  # noqa: E402
import scale  # noqa: E402

PARTS = ("client", "scale", "death", "memory", "fleet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use a tenth of the rows, images and caches: takes minutes instead of half an hour",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="TREE",
        help="only compare the client with that of another checkout (with `--only fleet`: over many endpoints)",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()

    def save() -> None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")

    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Linux, Python {platform.python_version()}"
    part = 0.1 if arguments.quick else 1.0

    def measured_fleet(before: Path | None = None) -> dict[str, object]:
        day, load = datetime.now(UTC).date().isoformat(), os.getloadavg()[0]
        runs = fleet.fleet_part([8, 64, 256], int(57_457 * part), before=before)
        return {"date": day, "load": round(load, 1), "runs": runs}

    if arguments.only == ["fleet"] and arguments.against is not None:
        found["fleet"] = measured_fleet(arguments.against.resolve())
        save()
        return
    if arguments.against is not None:
        tree = arguments.against.resolve()
        commit = subprocess.run(["git", "-C", tree, "rev-parse", "--short", "HEAD"], check=True, capture_output=True)
        rows = client.compare(tree, requests=int(60_000 * part), rounds=6 if arguments.quick else 10)
        found["against"] = {"commit": commit.stdout.decode().strip(), "runs": rows}
        save()
        return
    if "client" in arguments.only:
        found["client"] = client.measure_all(requests=int(60_000 * part), rounds=1 if arguments.quick else 3)
        save()
    if {"scale", "death"} & set(arguments.only):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            scale.MODEL["cache"] = int(scale.MODEL["cache"] * part)
            images = int(scale.IMAGES * part)
            size = scale.pictures(folder / "images", images)
            rows = scale.eight_files(folder, images, part)
            found["eight_files"] = {
                "rows": rows,
                "images": images,
                "image_bytes_mean": size,
                "server": scale.MODEL,
            }
            if "scale" in arguments.only:
                found["scale"] = scale.servers_part(folder, [1, 2, 8], rows, images)
                save()
            if "death" in arguments.only:
                found["death"] = scale.death_part(folder)
                save()
    if "fleet" in arguments.only:
        found["fleet"] = measured_fleet()
        save()
    if "memory" in arguments.only:
        found["memory"] = scale.memory_part(int(1_000_000 * part))
        save()


if __name__ == "__main__":
    main()
