"""Check on this machine's GPU that the packages of a lock in `images/` work. Run it with the Python of an environment installed from that lock.

    python bench/gpu/prove.py train        --work runs --out bench/gpu/proven-train.json
    python bench/gpu/prove.py infer-vllm   --work runs --out bench/gpu/proven-infer-vllm.json --model runs/prove-train/sft/model
    python bench/gpu/prove.py infer-sglang --work runs --out bench/gpu/proven-infer-sglang.json --model runs/prove-train/sft/model

It compares the installed packages with the lock, imports the entry modules of the image, and runs the image's work with the tiny model by `egm
run`: for `train`, SFT and three steps of RL (verl, FSDP, vLLM's rollouts); for the others, the engine's server with pictures, queried by the
evaluation's client. Packages that the machine provides (`--given 'torch*' 'nvidia-*'`) may have other versions; the report lists them. The exit
code is 1 if anything differs from the expectation.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grounding.local.runs import read_state
from grounding.progress import read_progress

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "images"), str(ROOT / "bench" / "gpu")]
from locks import LOCKS, versions  # noqa: E402
from rl import RECIPE, machine, measured  # noqa: E402

STEPS = 3
PER_FILE = 20  # number of questions in each of the eight files
OURS = ("egm-grounding", "pip")  # packages that no lock contains: the project itself, and pip
ENGINES = {"infer-sglang": "sglang", "infer-vllm": "vllm"}
IMPORT = """
import importlib, json, sys, time
for name in sys.argv[1:]:
    begun = time.monotonic()
    importlib.import_module(name)
    print("\\n" + json.dumps({name: round(time.monotonic() - begun, 1)}), flush=True)
"""


# ---- packages ----
def normal(name: str) -> str:
    """Return a package's name in the index's normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return name -> version of every package in this environment."""
    return {normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def compare(locked: Mapping[str, str], found: Mapping[str, str], given: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the installed packages with the lock: name -> [lock, machine], with None if a package is absent. Pure.

    `differ` contains faults. `given` contains all packages whose name matches a pattern of `given`, whether or not they are equal. The local part
    of a version, as in 2.11.0+cu130, is ignored, because the index has the version without it.
    """
    wanted = {normal(n): v for n, v in locked.items()}
    differ: dict[str, list[str | None]] = {}
    brought: dict[str, list[str | None]] = {}
    same = 0
    for name in sorted(wanted.keys() | found.keys() - set(OURS)):
        pair = [wanted.get(name), found.get(name)]
        if any(fnmatch.fnmatch(name, pattern) for pattern in given):
            brought[name] = pair
        elif (pair[1] or "").partition("+")[0] == (pair[0] or "").partition("+")[0]:
            same += 1
        else:
            differ[name] = pair
    return {"of_the_lock": len(wanted), "as_locked": same, "differ": differ, "given": brought}


def imports(modules: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return the seconds that each module's import took, one after another in one process, and the end of the output if one failed."""
    done = subprocess.run([sys.executable, "-c", IMPORT, *modules], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    seconds = {name: s for line in lines for name, s in json.loads(line).items()}
    return seconds, "" if done.returncode == 0 else done.stderr[-3000:]


# ---- work ----
def manifest(lock: str, model: str, gpus: int = 1) -> list[dict[str, Any]]:
    """Return the jobs that test the lock. Pure."""

    def job(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        shapes = {"shapes": {"seed": 7, "train": 6000, "perFile": PER_FILE}}
        head = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": kind, "metadata": {"name": name}}
        return {**head, "spec": {"data": shapes, **spec}}

    if lock in ENGINES:
        served = {"engine": ENGINES[lock], "servers": 1, "gpusPerServer": gpus, "sampling": {"maxTokens": 48}}
        return [job("GroundingEvalJob", "eval", {"model": {"source": model}, **served})]
    where = {"nodes": 1, "gpusPerNode": gpus}
    recipe = RECIPE | {"maxSteps": STEPS, "saveEvery": STEPS, "validateEvery": STEPS}
    each = {"dtype": "bfloat16", "microBatchSize": 16 // gpus}
    sft = {"preset": "tiny-sft", "model": {"source": model}, "resources": where, "hyperparameters": each}
    rl = {"batchSize": 32, "miniBatchSize": 32, "rollouts": 8, **recipe}
    return [
        job("GroundingTrainJob", "sft", sft),
        job(
            "GroundingTrainJob",
            "rl",
            {"preset": "tiny-rl", "model": {"trainJob": "sft"}, "resources": where, "hyperparameters": rl},
        ),
    ]


def run(lock: str, model: str, gpus: int, work: Path) -> tuple[dict[str, Any], str]:
    """Run the jobs in `work` by `egm run`; return their results, and a description of the failure or an empty text."""
    source = model
    if model == "tiny://":  # a job would train this model on the CPU
        from grounding.models.tiny import build, demo_corpus

        build(source := str(work / "tiny"), demo_corpus())
    jobs, file = manifest(lock, source, gpus), work / f"prove-{lock}.yaml"
    file.write_text("\n---\n".join(json.dumps(job, indent=1) for job in jobs) + "\n")
    code = subprocess.run([sys.executable, "-m", "grounding.cli", "run", "-f", file, "--runs", work]).returncode
    told, why = {}, f"egm run ended with exit code {code}" if code else ""
    for name in [job["metadata"]["name"] for job in jobs]:
        folder = work / file.stem / name
        state = read_state(folder)
        if state is None:
            continue
        roles = {r.name: round(max(0.0, r.finished_at - r.started_at), 1) for r in state.roles}
        told[name] = {"phase": state.phase, "seconds_of_roles": roles}
        if state.phase == "Succeeded":
            result, fault = {"sft": of_sft, "rl": of_rl, "eval": of_eval}[name](folder, model)
            told[name] |= result
            why = why or fault
    return told, why


def of_sft(folder: Path, _: str) -> tuple[dict[str, Any], str]:
    """Return steps and loss of SFT."""
    lines = [line for line in read_progress(folder / "progress.jsonl") if line["step"] > 0]
    losses = [round(line["metrics"]["loss"], 4) for line in (lines[0], lines[-1])]
    step = statistics.median(line["metrics"]["secondsStep"] for line in lines[1:])
    told = {"steps": lines[-1]["step"], "loss_first_last": losses, "seconds_step_median": round(step, 4)}
    return told, "" if losses[1] < losses[0] else f"the loss of SFT did not fall: {losses}"


def of_rl(folder: Path, _: str) -> tuple[dict[str, Any], str]:
    """Return one line per step, from verl's own file."""
    steps = measured(folder)
    if [s["step"] for s in steps if s["step"] > 0] != list(range(1, STEPS + 1)):
        return {"steps": steps}, f"the steps of RL are not 1 to {STEPS}"
    return {"steps": steps}, "" if (folder / "model" / "config.json").exists() else "RL has written no model"


def of_eval(folder: Path, model: str) -> tuple[dict[str, Any], str]:
    """Return the evaluation's results. Only a trained model must answer correctly."""
    summary = json.loads((folder / "summary.json").read_text())
    told = {k: summary[k] for k in ("errors", "unparsed", "macro")} | {"rows": sum(f["n"] for f in summary["files"])}
    told["latency_p50"] = round(statistics.median(f["latency_p50"] for f in summary["files"]), 4)
    if told["errors"] or told["rows"] != 8 * PER_FILE:
        return told, f"{told['errors']} of {told['rows']} questions failed"
    poor = model != "tiny://" and told["macro"] < 0.5
    return told, "a trained model answered less than half of the questions correctly" if poor else ""


def driver() -> dict[str, str]:
    """Return the GPU and its driver. Raises `SystemExit` if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as e:
        raise SystemExit(f"error: found no GPU: {e}") from None
    return dict(zip(("gpu", "driver", "gpu_memory"), (w.strip() for w in told[0].split(",")), strict=True))


def main() -> int:
    known = {x.name: x for x in LOCKS if x.name in ("train", *ENGINES)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", choices=sorted(known))
    parser.add_argument("--model", default="tiny://", help="Model to serve; a folder counts as a trained model.")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2, 4, 8), default=1, help="Number of training ranks, or of served replicas."
    )
    parser.add_argument("--given", nargs="*", default=[], metavar="PATTERN", help="Packages that the machine provides.")
    parser.add_argument(
        "--left-out", default="", metavar="WORDS", help="For the report: parts of packages that were removed."
    )
    parser.add_argument(
        "--packages-only", action="store_true", help="Only check packages and imports; no GPU is needed."
    )
    parser.add_argument("--work", type=Path, help="Folder to work in, which is kept; default: a temporary folder.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lock, begun = known[arguments.lock], time.monotonic()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="egm-prove-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    text = lock.path.read_text()
    packages = compare(versions(text), installed(), arguments.given)
    report: dict[str, Any] = {
        "what": f"the lock {lock.name}: packages, imports, work",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **({} if arguments.packages_only else driver()),
        "machine": machine(),
        "gpus_used": arguments.gpus,
        "left_out": arguments.left_out,
        "packages": packages,
    }

    def save(why: str = "") -> None:
        report["seconds"] = round(time.monotonic() - begun, 1)
        report["result"] = why or "as expected"
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    why = f"differs from the lock: {', '.join(packages['differ'])}" if packages["differ"] else ""
    print(json.dumps({k: v for k, v in packages.items() if k != "given"}), flush=True)
    report["imports_s"], said = imports(lock.entries)
    print(json.dumps(report["imports_s"]), said, flush=True)
    why = why or ("an entry module cannot be imported" if said else "")
    save(why or "not done")
    if not arguments.packages_only:
        report["jobs"], fault = run(lock.name, arguments.model, arguments.gpus, work)
        why = why or fault
    save(why)
    print(json.dumps(report.get("jobs", {}), indent=1))
    print(why or f"{lock.name}: as expected", flush=True)
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
