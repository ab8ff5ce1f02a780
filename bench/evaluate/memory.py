"""Measure the peak memory of one evaluation of a million rows after each stage. A part of `python bench/evaluate`; takes a few minutes of one core.

All rows are read, checked and distributed. All but `asked` of them already have an answer, which is written here as if by an earlier run, so
that the benchmark takes only minutes. These answers are read back, the other rows are asked at 512 in flight, and all rows are summarised and
written as parquet."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main(folder: Path, url: str, asked: int) -> None:
    from grounding.evaluate.client.dispatch import Dispatcher
    from grounding.evaluate.client.options import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.plan import plan
    from grounding.evaluate.reply import Reply
    from grounding.evaluate.results.writer import score_row
    from grounding.evaluate.run import run
    from grounding.scoring import get_profile

    found: dict[str, Any] = {"imports": peak_mb()}

    def note(name: str, start: float) -> None:
        found[name] = peak_mb()
        sys.stderr.write(f"{name}: {peak_mb()} MB, {time.perf_counter() - start:.0f} s\n")

    start = time.perf_counter()
    request = Request("m", "qwen3", get_engine("sglang").request_extras(Sampling()))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        options = Options((url,), request, 512, fixed=True)
        e = Evaluation((folder / "refcoco_val.jsonl",), (folder / "images",), out, "m", options)
        planned = plan(e)
        worklist, profile = planned.worklist, get_profile("egm")
        note("read", start)
        endpoints = [f"http://h{i}" for i in range(8)]
        Dispatcher(np.arange(len(worklist)), worklist.image, worklist.images, endpoints)
        note("dealt_to_8", start)
        (out / "results").mkdir(parents=True)
        reply = Reply('```json\n[{"bbox_2d": [100, 100, 500, 600], "label": "x"}]\n```', "stop", 300, 24, 0.7)
        with (out / "results/part-00000.jsonl").open("wb") as f:
            for row in range(len(worklist) - asked):
                scored = score_row(worklist.key(row), worklist.expression(row), reply, "m", "qwen3", profile)
                f.write(orjson.dumps(scored, option=orjson.OPT_APPEND_NEWLINE))
        note("answers_written", start)
        summary = run(e, planned)
        note("asked_and_summed_up", start)
    assert summary.done == summary.total == len(worklist), summary.reason
    print(json.dumps({"rows": len(worklist), "asked": asked, "in_flight": 512, "peak_mb": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
