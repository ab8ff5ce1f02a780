"""The functions for scripts and notebooks, with real files and a real server on loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from model_folders import write_model
from PIL import Image

from grounding import library
from grounding.errors import UserError
from grounding.library import Sampling, ask, evaluate, load_results, newest_model, score, train
from grounding.local.runs import JobState, write_state
from tests.unit.evaluate.conftest import Server


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (400, 200)).save(tmp_path / "p.png")
    rows = [
        {"image": "p.png", "sent": f"thing {i}", "bbox": [40, 20, 200, 120], "width": 400, "height": 200}
        for i in range(5)
    ]
    (tmp_path / "refcoco_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_ask_takes_a_path_bytes_and_a_pillow_image(server, data: Path) -> None:
    path = data / "p.png"
    with Image.open(path) as image:
        image.load()
    for picture in (path, str(path), path.read_bytes(), image):
        found = ask(picture, "thing 0", endpoint=server.url, model="m", sampling=Sampling(max_tokens=9))
        assert found.box == (40.0, 20.0, 200.0, 120.0)
    assert {b["max_tokens"] for b in server.bodies} == {9}
    with pytest.raises(UserError, match="no such"):
        ask(data / "gone.png", "x", endpoint=server.url, model="m")


def test_evaluate_and_load_results(server, data: Path) -> None:
    out = data / "out"
    summary = evaluate(data / "refcoco_val.jsonl", data, endpoint=server.url, model="m", out=out, concurrency=2)
    assert (summary.done, summary.total, summary.errors, summary.reason) == (5, 5, 0, None)
    [file] = summary.files
    assert file.name == "refcoco_val" and file.accuracy == summary.macro and summary.interval is not None
    asked = server.count
    assert evaluate([data / "refcoco_val.jsonl"], [data], endpoint=[server.url], model="m", out=out) == summary
    assert server.count == asked  # the second run asked nothing

    results = load_results(out)
    assert results.summary == summary and len(results) == 5
    table = results.to_arrow()
    assert table.column("sent").to_pylist() == [f"thing {i}" for i in range(5)]
    assert table.column("bbox").to_pylist()[0] == [40.0, 20.0, 200.0, 120.0]
    pandas = pytest.importorskip("pandas")
    frame = results.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.correct.mean() == pytest.approx(summary.micro)


def test_without_pandas_arrow_is_named(server, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(data / "refcoco_val.jsonl", data, endpoint=server.url, model="m", out=data / "out")
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pandas is not installed(.|\n)*to_arrow"):
        load_results(data / "out").to_pandas()


def test_results_that_are_not_there_or_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation"):
        load_results(tmp_path)
    (tmp_path / "results").mkdir()
    found = load_results(tmp_path)
    assert found.summary is None and len(found) == 0 and found.to_arrow().num_rows == 0


def test_score_is_the_profiles() -> None:
    found = score('[{"bbox_2d": [100, 100, 500, 600]}]', (40, 20, 200, 120), 400, 200)
    assert (found.iou, found.correct, found.parsed) == (1.0, True, True)
    assert not score("nothing", (0, 0, 1, 1), 10, 10).parsed
    thought = "<think>[0, 0, 10, 10]</think>[100, 100, 500, 600]"
    box = (40, 20, 200, 120)
    assert not score(thought, box, 400, 200).correct
    assert score(thought, box, 400, 200, scoring="answer-after-thinking").correct


def test_the_newest_model_of_the_runs(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    for name, kind, at, phase in [
        ("sft", "GroundingTrainJob", 10.0, "Succeeded"),
        ("rl", "GroundingTrainJob", 20.0, "Succeeded"),
        ("more", "GroundingTrainJob", 30.0, "Failed"),
        ("eval", "GroundingEvalJob", 40.0, "Succeeded"),
    ]:
        (run / name / "model").mkdir(parents=True)
        (run / name / "model" / "config.json").write_text("{}")
        write_state(run / name, JobState(name, kind, phase=phase, finished_at=at))
    (run / "run.json").write_text('{"jobs": []}')
    assert newest_model(tmp_path / "runs") == run / "rl" / "model"
    (run / "rl" / "model" / "config.json").unlink()
    assert newest_model(tmp_path / "runs") == run / "sft" / "model"


def test_serve_checks_the_machine_before_it_starts_anything(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a server of .* cannot start here(.|\n)*none does not exist") as told,
        library.serve(tmp_path / "none"),
    ):
        pass
    assert "egm doctor -f" not in str(told.value), (
        "expected no advice to run `egm doctor -f`, because there is no manifest"
    )
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"sglang is not installed"), library.serve(model, engine="sglang"):
        pass


def test_train_runs_a_manifest_and_says_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingTrainJob\nmetadata: {name: a}\n"
        "spec: {method: sft, preset: tiny-sft, suspend: true, data: {shapes: {}}}\n"
    )
    [job] = train(file, runs=tmp_path / "runs")
    assert (job.name, job.phase, job.model, job.results) == ("a", "Suspended", None, None)
    file.write_text("apiVersion: nothing\n")
    with pytest.raises(UserError, match="exit code 2"):
        train(file, runs=tmp_path / "runs")


SERVER = """#!{python}
import http.server, json, os, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({{"choices": [{{"message": {{"content": "[0, 0, 500, 500]"}}, "finish_reason": "stop"}}]}})
        self.send_response(200); self.end_headers(); self.wfile.write(body.encode())
    def log_message(self, *a): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), H).serve_forever()
"""


def test_serve_is_over_when_its_block_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is replaced by a small program; the role, its supervisor, the probe and the question are real."""
    environment = tmp_path / "bin"
    environment.mkdir()
    (environment / "server").write_text(SERVER.format(python=sys.executable))
    packages = {"packages": dict.fromkeys(("transformers", "torch", "fastapi", "uvicorn"), "1"), "cuda": ""}
    (environment / "python").write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo \'{json.dumps(packages)}\' || exec {environment}/server "$@"\n'
    )
    for program in environment.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("EGM_ENGINE_PYTHON", str(environment / "python"))
    model = write_model(tmp_path / "model")
    Image.new("RGB", (100, 50)).save(tmp_path / "p.png")
    said: list[str] = []
    with library.serve(model, say=said.append) as url:
        found = ask(tmp_path / "p.png", "x", endpoint=url, engine="transformers")
        assert found.box == (0.0, 0.0, 50.0, 25.0)
    assert "1 stopped" in said[-1]
    with pytest.raises(library.Failure, match="does not answer"):
        ask(tmp_path / "p.png", "x", endpoint=url, engine="transformers")


def test_no_server_is_started_for_a_picture_that_does_not_exist(data: Path) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="no such file"):
        ask(data / "gone.png", "x", model=data / "no model", say=said.append)
    assert said == []
