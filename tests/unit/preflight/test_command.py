"""`egm doctor`, and the check before `egm run` and `egm serve`: faults are reported before anything is downloaded or started."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from grounding.api import load
from grounding.cli import run as egm
from grounding.local.command import planned_jobs
from grounding.local.runs import JobState, write_state
from grounding.local.scheduler import digest
from grounding.preflight import command, judge, probe
from grounding.preflight.needs import needs_of

EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: look}
spec: {engine: ENGINE, gpusPerServer: 1, model: {source: MODEL}, data: {images: [IMAGES], files: [FILES]}}
"""


def manifest(folder: Path, engine: str = "sglang", model: str = "hf://owner/name") -> Path:
    file = folder / "job.yaml"
    text = EVAL.replace("ENGINE", engine).replace("MODEL", model)
    text = text.replace("IMAGES", str(folder)).replace("FILES", str(folder / "a.jsonl"))
    (folder / "a.jsonl").touch()
    file.write_text(text if engine != "transformers" else text.replace("gpusPerServer: 1, ", ""))
    return file


def test_a_missing_engine_is_noticed_first_by_run_and_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a request to the hub would be another failure
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    file, runs = manifest(tmp_path), tmp_path / "runs"
    for words in (["run"], ["serve", "--port", "0"]):
        assert egm([*words, "-f", str(file), "--runs", str(runs)]) == 2
        error = capfd.readouterr().err
        first = error.splitlines()[1]
        assert first.startswith("FAILED   packages of server  sglang is not installed for")
        assert "egm setup gpu --engine sglang" in error and "EGM_ENGINE_PYTHON=$PWD/" in error
        assert "hub" not in error and "egm doctor -f" in error
    assert not (runs / "job" / "data").exists() and not (tmp_path / "cache").exists()


def test_the_lock_that_a_cure_names_is_in_the_checkout() -> None:
    from grounding.evaluate.engines import ENGINES
    from grounding.preflight.needs import TRAIN_LOCK

    root = Path(__file__).parents[3]
    locks = [e.lock for e in ENGINES.values() if e.lock] + [TRAIN_LOCK]
    assert len(locks) == 3
    for lock in locks:
        assert (root / lock).is_file()
    for engine in ENGINES.values():
        text = (root / engine.lock).read_text() if engine.lock else ""
        assert all(f"\n{p}==" in text for p in engine.packages if engine.lock)


def test_a_finished_job_is_not_checked_again_and_a_changed_one_is(tmp_path: Path) -> None:
    file = manifest(tmp_path, "transformers", "tiny://")
    jobs, run_dir = planned_jobs(file), tmp_path / "runs" / "job"
    assert [w.name for w in command.unfinished(run_dir, jobs)] == ["look"]
    state = JobState("look", "GroundingEvalJob", phase="Succeeded", digest=digest(jobs[0], ""))
    (run_dir / "look").mkdir(parents=True)
    write_state(run_dir / "look", state)
    assert command.unfinished(run_dir, jobs) == []
    file.write_text(file.read_text().replace("tiny://", "/elsewhere"))
    assert [w.name for w in command.unfinished(run_dir, planned_jobs(file))] == ["look"]


@pytest.mark.parametrize(("engine", "model", "stacks", "gpus"), [
    ("sglang", "hf://o/n", [("server", True)], 1),
    ("vllm", "hf://o/n", [("server", True)], 1),
    ("transformers", "tiny://", [("server", True), ("model", False)], 0),
])  # fmt: skip
def test_needs_of_an_evaluation(
    tmp_path: Path, engine: str, model: str, stacks: list[tuple[str, bool]], gpus: int
) -> None:
    file = manifest(tmp_path, engine, model)
    [found] = command.needs(file, planned_jobs(file), tmp_path / "runs")
    assert [(s.role, s.engine) for s in found.stacks] == stacks and found.gpus == gpus
    fields = [s.field for s in found.sources]
    assert fields == ["spec.data.files[0]", "spec.data.images[0]"] + ["spec.model.source"] * (model != "tiny://")
    served = needs_of(load(file)[0], (), data=False)
    assert [s.field for s in served.sources] == ["spec.model.source"] * (model != "tiny://") and not served.output


def test_needs_of_the_recipe() -> None:
    root = Path(__file__).parents[3]
    file = root / "jobs" / "egm8b-pipeline.yaml"
    text = file.read_text().replace("your-bucket", "b")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "p.yaml"
        copy.write_text(text)
        sft, rl, measured = command.needs(copy, planned_jobs(copy), Path(folder))
    assert (sft.gpus, rl.gpus, measured.gpus) == (8, 8, 8)
    assert "verl" not in sft.stacks[0].packages and {"verl", "vllm"} <= set(rl.stacks[0].packages)
    assert measured.stacks[0].packages == ("sglang",) and rl.output == "s3://b/egm8b-pipeline-rl"
    assert len(measured.sources) == 9  # eight files and one tar; the model comes from the other job


def test_doctor_without_a_job_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["doctor", "--no-network", "--json", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    subjects = [c["subject"] for c in found["checks"]]
    assert found["exitCode"] == 0 and len(subjects) == len(set(subjects))
    assert {"engine sglang", "driver", "GPUs", "CUDA", "memory", "shared memory", "disk of runs", "ports"} <= set(
        subjects
    )


def test_doctor_for_a_job_ends_with_the_code_that_run_would_end_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = manifest(tmp_path)
    assert egm(["doctor", "--no-network", "-f", str(file), "--runs", str(tmp_path)]) == 2
    assert "sglang is not installed" in capsys.readouterr().out
    # a variable names the engine's environment, which is then checked
    other = tmp_path / "python"
    other.write_text('#!/bin/sh\necho \'{"packages": {"sglang": "0.5.12"}, "cuda": "12.8"}\'\n')
    other.chmod(0o755)
    monkeypatch.setenv("EGM_ENGINE_PYTHON", str(other))
    found = command.examine(command.needs(file, planned_jobs(file), tmp_path), tmp_path, ask=False)
    assert found[0].state == "ok" and "sglang 0.5.12" in found[0].message


def test_a_job_that_can_run_here_passes(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "fastapi")):
        pytest.skip("needs the extra cpu")
    file = manifest(tmp_path, "transformers", "tiny://")
    wanted = command.needs(file, planned_jobs(file), tmp_path)
    found = judge.local(probe.machine(wanted, judge.NAMES, (), tmp_path), wanted)
    assert [v for v in found if v.state == "failed"] == []
    assert found[0].subject == "packages of server" and str(Path(sys.executable)) not in found[0].message


def test_a_placeholder_is_one_of_the_doctors_findings_and_stops_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = manifest(tmp_path)
    file.write_text(file.read_text().replace("spec: {", "spec: {output: s3://your-bucket/x, "))
    assert egm(["doctor", "-f", str(file), "--no-network"]) == 2
    said = capsys.readouterr().out
    assert said.startswith("FAILED   output") and "s3://your-bucket/x contains a placeholder" in said
    assert "FAILED   packages of server" in said and "remove the line with `output`" in said
    assert egm(["run", "-f", str(file), "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "contains a placeholder of an example" in said and "remove the line with `output`" in said


def test_the_address_of_the_page_is_printed_when_the_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert egm(["run", "-f", str(manifest(tmp_path)), "--runs", str(tmp_path / "runs"), "--view"]) == 2
    said = capsys.readouterr()
    assert "cannot start here" in said.err and "Live page" not in said.out
