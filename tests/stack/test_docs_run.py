"""Commands of README and docs without special needs run page by page and in order, in a folder with the files that the
pages name.

These are `jobs/`, evaluation files and pictures, answers, results, a finished run. tests/unit/test_docs_commands.py
says which fences run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from grounding import library
from grounding.data import shapes
from grounding.local.runs import JobState, write_state
from tests.unit.evaluate.conftest import Server
from tests.unit.report import samples
from tests.unit.test_docs_commands import PAGES, ROOT, blocks

URL = "http://127.0.0.1:30000"
"""The address of the server in the pages, which the test replaces by that of its own server"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all files that the pages name."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("jobs", "charts", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    shapes.generate(folder / "set", shapes.ShapeSet(seed=1, train=8, per_file=4, size=64))
    (folder / "coco").symlink_to(folder / "set" / "images")
    with tarfile.open(folder / "coco.tar", "w") as tar:
        for picture in sorted((folder / "set" / "images").rglob("*.png")):
            tar.add(picture, str(picture.relative_to(folder / "set" / "images")))
    (folder / "rl.json").symlink_to(folder / "set" / "train_data" / "rl.json")
    for file in (folder / "set" / "eval_data").iterdir():
        (folder / file.name).symlink_to(file)
    picture = next((folder / "set" / "images" / "eval").glob("*.png"))
    (folder / "street.jpg").symlink_to(picture)
    row = {"text": "[1, 2, 3, 4]", "bbox": [0, 0, 9, 9], "width": 64, "height": 64}
    (folder / "answers.jsonl").write_text((json.dumps(row) + "\n") * 3)
    for name in (
        "results",
        "others",
        "results/egm-8b",
        "results/before",
        "results/after",
        "results/a",
        "results/b",
        "results/c",
        "runs/demo/demo-after",
    ):
        files, out = [folder / "refcoco_val.jsonl"], folder / name
        library.evaluate(files, folder / "coco", endpoint=server.url, model="EGM-8B", out=out)
    run = folder / "runs" / "demo"
    (run / "run.json").write_text(json.dumps({"jobs": [{"name": "demo-rl"}, {"name": "demo-after"}]}))
    write_state(run / "demo-rl", JobState("demo-rl", "GroundingTrainJob", phase="Succeeded"))
    write_state(run / "demo-after", JobState("demo-after", "GroundingEvalJob", phase="Succeeded"))
    (run / "demo-rl" / "logs").mkdir()
    samples.sweep(folder / "runs" / "sweep" / "sweep", samples.pictures(folder / "sweep-pictures"))
    (run / "demo-rl" / "logs" / "rl.log").write_text("step 1\n")
    return folder


RUN = [p for p in PAGES if any(b.language == "sh" and not b.needs for b in blocks(p.read_text()))]


@pytest.mark.stack
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, place: Path, server: Server) -> None:
    chosen = [b for b in blocks(page.read_text()) if b.language == "sh" and not b.needs]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "EGM_CACHE": str(place / "cache"), "AWS_EC2_METADATA_DISABLED": "true"}
    env |= {"HF_ENDPOINT": server.url, "COLUMNS": "120"}
    for block in chosen:
        text = block.text.replace(URL, server.url)
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", text],
            cwd=place, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, f"{page.name}:{block.line}: {text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        assert "Traceback" not in done.stderr
