"""Start a real server of an engine by `egm serve`, query it by `egm eval`, stop it by SIGTERM, and print the observations as JSON.

    python bench/engines/real.py sglang --python /path/of/its/environment/bin/python [--work DIR]

This is for a machine without a GPU. The model is a tiny random Qwen3-VL in float32, so the results test the protocol, not the speed.
docs/evaluation.md (Engines) describes how to create the environments. SGLang gets a stub of its CUDA kernels (stub_kernels.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import stub_kernels

EGM = [sys.executable, "-m", "grounding.cli"]
MANIFEST = """\
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {{name: tiny}}
spec:
  model: {{source: {model}}}
  engine: {engine}
{gpus}
  servers: {servers}
  data: {{shapes: {{perFile: 8}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("sglang", "vllm", "transformers"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the engine's environment")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--work", type=Path)
    a = parser.parse_args()
    work = (a.work or Path(tempfile.mkdtemp(prefix="egm-engine-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"EGM_ENGINE_PYTHON": a.python, "HF_HUB_OFFLINE": "1"}
    model = work / "model"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, "-m", "grounding.models.tiny", str(model)], check=True)
    stub_kernels.write(work / "stub")
    if a.engine == "sglang":
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(work / "stub"), env.get("PYTHONPATH"))))
    gpus = "" if a.engine == "transformers" else "  gpusPerServer: 0"
    manifest = work / "job.yaml"
    manifest.write_text(MANIFEST.format(model=model, engine=a.engine, gpus=gpus, servers=a.servers))
    data = work / "data"
    subprocess.run([*EGM, "role", "prepare", "--job", str(manifest), "--data", str(data)], check=True)
    shapes = next(data.glob("shapes-*"))

    start = time.monotonic()
    serve = subprocess.Popen(
        [*EGM, "serve", "-f", str(manifest), "--port", "0", "--runs", str(work / "runs")],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serve.stdout is not None
    endpoints = [serve.stdout.readline().strip() for _ in range(a.servers)]
    if not all(endpoints):
        raise SystemExit(serve.wait() or 1)
    ready_s = time.monotonic() - start
    try:
        files = sorted((shapes / "eval_data").glob("*.jsonl"))
        command = [*EGM, "eval", "--json", "--engine", a.engine, "--model", str(model), "--out", str(work / "out")]
        command += [
            "--images",
            str(shapes / "images"),
            "--max-tokens",
            "24",
            "--concurrency",
            "4",
            "--files",
            *map(str, files),
        ]
        for endpoint in endpoints:
            command += ["--endpoint", endpoint]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        summary = json.loads(done.stdout) if done.stdout else {"error": done.stderr[-2000:]}
    finally:
        start = time.monotonic()
        serve.send_signal(signal.SIGTERM)
        code = serve.wait()
    keys = ("total", "done", "errors", "requests_per_second", "servers", "error")
    facts = {k: summary[k] for k in keys if k in summary}
    sys.stdout.write(
        json.dumps(
            {
                "engine": a.engine,
                "ready_s": round(ready_s, 1),
                **facts,
                "stopped_s": round(time.monotonic() - start, 1),
                "serve_exit": code,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
