"""The values by which two runs of the demo are compared: their evaluations without times, and RL's curve."""

import json


def table(read):
    """Return both evaluations without times. `read` returns the text of a file of the run, such as `demo-before/summary.json`."""
    found = {}
    for job in ("demo-before", "demo-after"):
        summary = json.loads(read(f"{job}/summary.json"))
        assert summary["done"] == summary["total"] and not summary["errors"]
        files = [{k: v for k, v in f.items() if "latency" not in k} for f in summary["files"]]
        found[job] = {k: summary[k] for k in ("macro", "micro", "ci95", "unparsed", "truncated")} | {"files": files}
    return found


def curve(read):
    """Return step and score of each step of RL, without times."""
    lines = [json.loads(line) for line in read("demo-rl/progress.jsonl").splitlines()]
    return [(line["step"], line["metrics"].get("score")) for line in lines if "step" in line]
