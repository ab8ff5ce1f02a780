"""What two runs of the demo are compared by: everything of their evaluations but times, and RL's curve."""

import json


def table(read):
    """Everything of both evaluations but times. `read` gives the text of a file of the run, `demo-before/summary.json`."""
    found = {}
    for job in ("demo-before", "demo-after"):
        summary = json.loads(read(f"{job}/summary.json"))
        assert summary["done"] == summary["total"] and not summary["errors"]
        files = [{k: v for k, v in f.items() if "latency" not in k} for f in summary["files"]]
        found[job] = {k: summary[k] for k in ("macro", "micro", "ci95", "unparsed", "truncated")} | {"files": files}
    return found


def curve(read):
    """Step and score of each step of RL: what training did, whenever it did it."""
    lines = [json.loads(line) for line in read("demo-rl/progress.jsonl").splitlines()]
    return [(line["step"], line["metrics"].get("score")) for line in lines if "step" in line]
