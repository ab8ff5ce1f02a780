"""Compare the CPU seconds of `egm data prepare` with a plain program that does what the reference's script does for every row.

    python bench/data/prepare.py [--rows 20000] [--out bench/data/prepare.json]

Like the reference's script, the plain program opens the header of a row's picture for every row and builds one dictionary per row, with
`datasets.map` in one process; its code is our own. Both programs run in separate processes with one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

ROWS_A_PICTURE = 5.6  # as in RefCOCO's training rows


def make(folder: Path, rows: int) -> Path:
    """Write training rows and their pictures, in COCO's sizes."""
    images = folder / "coco/train2014"
    images.mkdir(parents=True)
    count = max(1, round(rows / ROWS_A_PICTURE))
    for i in range(count):
        Image.new("RGB", (640, 480), (i % 256, 9, 9)).save(images / f"COCO_train2014_{i:012d}.jpg")
    with (folder / "rl.jsonl").open("wb") as f:
        for i in range(rows):
            box = [i % 400, i % 300, i % 400 + 300, i % 300 + 500]
            turns = [
                {"from": "human", "value": f"<image>\nPlease find <ref>thing {i}</ref>"},
                {"from": "gpt", "value": f"<box>{box}</box>"},
            ]
            row: dict[str, Any] = {
                "id": i,
                "image": f"coco/train2014/COCO_train2014_{i % count:012d}.jpg",
                "height": 480,
                "width": 640,
            }
            f.write(orjson.dumps(row | {"sent": f"the thing number {i}", "conversations": turns}) + b"\n")
    return folder / "rl.jsonl"


def plain(source: Path, images: Path, out: Path) -> None:
    """Prepare one row at a time: open its picture, parse its box, build its dictionary."""
    import datasets

    datasets.disable_progress_bars()

    def row(example: dict[str, Any], index: int) -> dict[str, Any]:
        turns = example.pop("conversations")
        path = images / example["image"]
        with Image.open(path) as image:
            width, height = image.size
        found = re.search(r"<box>\s*\[(.*?)\]\s*</box>", turns[1]["value"])
        assert found is not None
        text = f"<image>\nLocate {example['sent']}, output its bbox coordinates using JSON format"
        return {
            "data_source": "grounding",
            "prompt": [{"role": "user", "content": text}],
            "images": [str(path)],
            "ability": "grounding",
            "reward_model": {"style": "rule", "ground_truth": [int(v) for v in found[1].split(",")]},
            "extra_info": {
                "split": "train",
                "index": index,
                "id": example["id"],
                "height": height,
                "width": width,
                "question": text,
            },
        }

    rows = datasets.load_dataset("json", data_files=str(source), cache_dir=str(out / "cache"))["train"]
    rows.map(row, with_indices=True).to_parquet(out / "train.parquet")


def ours(source: Path, images: Path, out: Path) -> None:
    """Prepare the same rows with this project's code."""
    from grounding.data.prepare import prepare

    prepare([source], [], [images], out)


def measure(which: str, source: Path, images: Path) -> dict[str, float]:
    """Run one of the two programs in a separate process. Return CPU seconds without the imports, and peak memory in MB."""
    with tempfile.TemporaryDirectory() as out:
        code = (
            "import sys,resource,runpy,pathlib,datasets,pyarrow.parquet,PIL.JpegImagePlugin,grounding.data.prepare;"
            f"m=runpy.run_path({str(Path(__file__))!r});u=lambda:sum(resource.getrusage(resource.RUSAGE_SELF)[:2]);s=u();"
            f"m[{which!r}](*map(pathlib.Path,sys.argv[1:]));"
            "print(u()-s,resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)"
        )
        argv = [sys.executable, "-c", code, str(source), str(images), out]
        env = os.environ | {"HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        seconds, memory = subprocess.run(argv, check=True, capture_output=True, text=True, env=env).stdout.split()[-2:]
    return {"cpu_s": round(float(seconds), 2), "memory_mb": round(float(memory))}


def main() -> None:
    """Measure both programs alternately, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder), given.rows)
        rounds = [{w: measure(w, source, Path(folder)) for w in ("plain", "ours")} for _ in range(given.rounds)]
    best = {w: min((r[w] for r in rounds), key=lambda m: m["cpu_s"]) for w in ("plain", "ours")}
    result = {
        "rows": given.rows,
        **best,
        "ratio": round(best["plain"]["cpu_s"] / best["ours"]["cpu_s"], 2),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
