"""A real `egm eval` as a child process, with a server that counts requests and whose answers depend on the question."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from misbehaving import CONCURRENCY, ROWS, Misbehaving, response
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


IMAGES = 60


def answer(question):
    number = int("".join(c for c in question if c.isdigit()))
    text = json.dumps([{"bbox_2d": [100, 100, 500 + 60 * (number % 10), 600], "label": "x"}])
    message = {"role": "assistant", "content": text}
    return response(200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())


@pytest.fixture
def server():
    server = Misbehaving()
    server.answer = answer
    yield server
    server.close()


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(IMAGES):
        Image.new("RGB", (100, 80), (4 * i, 10, 10)).save(tmp_path / "images" / f"{i}.png")
    box = {"bbox": [10, 8, 50.5, 48], "width": 100, "height": 80}
    for name in ("refcoco_val", "refcoco+_testA"):
        rows = [{"image": f"{i % IMAGES}.png", "sent": f"thing {i}"} | box for i in range(ROWS // 2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def start(data, server):
    """Start the command that writes to a folder, and keep its output."""

    def start(out, **more):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
        command = [
            *(sys.executable, "-m", "grounding.cli", "eval", "--files", "refcoco_val.jsonl", "refcoco+_testA.jsonl"),
            *("--images", "images", "--endpoint", server.url, "--model", "m", "--concurrency", str(CONCURRENCY)),
            *("--out", str(out), "--json"),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=data, env=environment, **pipes, **more)

    return start


@pytest.fixture
def finish(start):
    """Run the command to its end and return its output."""

    def finish(out):
        output, errors = start(out).communicate(timeout=100)
        assert errors == "" or "Traceback" not in errors
        return json.loads(output)

    return finish
