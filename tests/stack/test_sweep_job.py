"""`jobs/sweep.yaml` with the real trainer and server: after two `kill -9`, the table is the same, and the page exists.

It takes half an hour of two cores: `pytest -s -m train tests/stack/test_sweep_job.py`. `EGM_SWEEP_REFERENCE` names a finished run folder
(`runs/sweep`) of this checkout, which saves the undisturbed run.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.sweep import read_sweep

REPOSITORY = Path(__file__).parents[2]
MODELS = ("small", "large")


def start(runs, log):
    command = [sys.executable, "-m", "grounding.cli", "run", "-f", "jobs/sweep.yaml", "--runs", str(runs)]
    with log.open("ab") as sink:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=sink, stderr=sink, start_new_session=True)


def answers(run):
    """Return the texts of all answers, by setting and question."""
    found = {}
    for s in read_sweep(run / "sweep"):
        for row in read_rows(s.folder):
            texts = [a["text"] for a in row.get("samples") or [row]]
            found[s.model, s.name, row["key"]] = texts
    return found


def table(run):
    """Return the page's table without times."""
    rows = list(csv.DictReader((run / "report" / "sweep.csv").open()))
    return [
        {k: r[k] for k in ("model", "setting", "macro", "low", "high", "thought_tokens", "answer_tokens")} for r in rows
    ]


@pytest.mark.stack
@pytest.mark.train
@pytest.mark.timeout(5400)
def test_a_sweep_killed_twice_ends_in_the_same_table(tmp_path):
    log, given = tmp_path / "log", os.environ.get("EGM_SWEEP_REFERENCE")
    reference = Path(given) if given else tmp_path / "reference" / "sweep"
    if not given:
        assert start(tmp_path / "reference", log).wait() == 0, log.read_text()[-3000:]
    assert len(table(reference)) == 16  # 2 models x 4 budgets x 2 sample counts
    run = tmp_path / "runs" / "sweep"
    run.mkdir(parents=True)
    for name in (*MODELS, "data", "run.json"):  # the run to be killed starts from the same trained models
        (shutil.copytree if (reference / name).is_dir() else shutil.copy)(reference / name, run / name)
    for model in MODELS:
        child = start(tmp_path / "runs", log)
        end, folder = time.monotonic() + 900, run / "sweep" / "models" / model
        summary = run / "sweep" / "summary.json"  # the run writes this file from time to time
        while not summary.exists() or sum(p.stat().st_size for p in folder.glob("settings/*/results/part-*")) < 20_000:
            assert child.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        child.send_signal(signal.SIGKILL)
        child.wait()
        told = json.loads(summary.read_bytes())
        assert 0 < told["done"] < told["total"] and told["reason"]
    assert start(tmp_path / "runs", log).wait() == 0, log.read_text()[-3000:]
    assert answers(run) == answers(reference)
    assert table(run) == table(reference)
    assert "In words" in (run / "report" / "sweep.html").read_text()
