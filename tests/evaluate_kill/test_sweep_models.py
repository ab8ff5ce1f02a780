"""A sweep over two models by `egm run`: a small program replaces the engine, and everything else is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from model_folders import write_model
from PIL import Image

from grounding.evaluate.results.reader import read_answers
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.sweep import read_sweep

ENGINE = """#!{python}
import http.server, json, os, sys, threading, time
NAME = sys.argv[sys.argv.index("--served-model-name") + 1].rpartition("/")[2]
with open({starts!r}, "a") as f:
    f.write(NAME + "\\n")
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def send(self, body):
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self):
        self.send({{"data": [{{"id": NAME}}]}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({asked!r}, "a") as f:
            f.write(NAME + "\\n")
        time.sleep({delay})
        last = body["messages"][-1]
        number = int("".join(c for c in body["messages"][0]["content"][1]["text"] if c.isdigit()) or 0)
        if last["role"] == "user" and body["max_tokens"] == 6:
            text, tokens, end = "word " * 6, 6, "length"
        else:
            thought = last["role"] == "assistant" and "word" in last["content"]
            right = number < 6 + 5 * thought + 9 * (NAME == "large")
            text, tokens, end = json.dumps([{{"bbox_2d": [100, 100, 500 if right else 120, 600]}}]), 5, "stop"
        choices = [{{"message": {{"role": "assistant", "content": text}}, "finish_reason": end}}] * body.get("n", 1)
        prompt = 5 if body.get("continue_final_message") else 7
        usage = {{"prompt_tokens": prompt, "completion_tokens": tokens * body.get("n", 1)}}
        self.send({{"choices": choices, "usage": usage}})
    def log_message(self, *a): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), H).serve_forever()
"""
JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: sweep}
spec:
  engine: vllm
  gpusPerServer: 0
  data: {files: [FOLDER/refcoco_val.jsonl], images: [FOLDER/images]}
  sampling: {maxTokens: 64, temperature: 0.7, seed: 1}
  sweep:
    models: [{source: FOLDER/small}, {source: FOLDER/large}]
    thinkingBudgets: [0, 6]
    samples: [1, 2]
  concurrency: 4
"""
ROWS = 24
SETTINGS = ["think-0", "think-0_samples-2", "think-6", "think-6_samples-2"]


class Place:
    """A manifest with its data, and the program that replaces vLLM."""

    def __init__(self, folder: Path, delay: float) -> None:
        self.folder = folder
        for model in ("small", "large"):
            write_model(folder / model)
        (folder / "images").mkdir()
        for i in range(4):
            Image.new("RGB", (100, 80), (60 * i, 10, 10)).save(folder / "images" / f"{i}.png")
        row = {"bbox": [10, 8, 50.5, 48], "width": 100, "height": 80}
        rows = [{"image": f"{i % 4}.png", "sent": f"thing {i}"} | row for i in range(ROWS)]
        (folder / "refcoco_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "sweep.yaml").write_text(JOB.replace("FOLDER", str(folder)))
        (folder / "bin").mkdir()
        self.starts, self.asked = folder / "starts", folder / "asked"
        given = {"python": sys.executable, "starts": str(self.starts), "asked": str(self.asked), "delay": delay}
        (folder / "bin" / "server").write_text(ENGINE.format(**given))
        packages = json.dumps({"packages": {"vllm": "1"}, "cuda": ""})
        (folder / "bin" / "python").write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && echo \'{packages}\' || exec {folder}/bin/server "$@"\n'
        )
        for program in (folder / "bin").iterdir():
            program.chmod(0o755)

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "sweep" / "sweep"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "grounding.cli", "run", "-f", str(self.folder / "sweep.yaml")]
        environment = os.environ | {
            "EGM_ENGINE_PYTHON": str(self.folder / "bin" / "python"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def finish(self) -> None:
        child = self.start()
        said, _ = child.communicate(timeout=90)
        assert child.returncode == 0, said

    def lines(self, file: Path) -> list[str]:
        return file.read_text().split() if file.exists() else []

    def table(self) -> list[tuple[str, str, object, object]]:
        summary = json.loads((self.out / "summary.json").read_bytes())
        assert not [note for note in summary["notes"] if "continue" in note]
        assert (summary["done"], summary["total"], summary["reason"]) == (8 * ROWS, 8 * ROWS, None), summary["reason"]
        return [(s["model"], s["name"], s["macro"], s["ci95"]) for s in summary["settings"]]


@pytest.mark.timeout(300)
def test_two_models_killed_twice_and_resumed_give_the_table_of_an_undisturbed_run(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = Place(tmp_path / "whole", 0.0), Place(tmp_path / "killed", 0.02)
    whole.finish()
    assert whole.lines(whole.starts) == ["small", "large"]  # one start per model
    expected = [(Path(model).name, *rest) for model, *rest in whole.table()]
    assert [(m, n) for m, n, *_ in expected] == [(m, n) for m in ("small", "large") for n in SETTINGS]
    assert [macro for _, _, macro, _ in expected] == [n / 24 for n in (6, 6, 11, 11, 15, 15, 20, 20)]

    for model in ("small", "large"):  # kill the run while it measures each model
        child = killed.start()
        end = time.monotonic() + 60
        while killed.lines(killed.asked).count(model) < 60:
            assert child.poll() is None and time.monotonic() < end, child.communicate()
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert set(killed.lines(killed.starts)) == {"small", "large"}
    killed.finish()
    assert [(Path(model).name, *rest) for model, *rest in killed.table()] == expected
    settings = read_sweep(killed.out)
    assert [(Path(s.model).name, s.name) for s in settings] == [(m, n) for m in ("small", "large") for n in SETTINGS]
    for s in settings:
        assert len(read_answers(s.folder)) == ROWS
        assert {r["model"] for r in read_rows(s.folder)} == {s.model}
    asked = len(killed.lines(killed.asked))
    least = len(whole.lines(whole.asked))
    assert least <= asked <= least + 3 * 4 * 4, (least, asked)  # only requests in flight are repeated
    killed.finish()  # the run is finished, so no server starts
    assert len(killed.lines(killed.asked)) == asked
