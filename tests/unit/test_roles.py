"""Job -> roles, as tables: who runs, with what arguments, after whom."""

from pathlib import Path

import pytest

from grounding import flashinfer
from grounding.api import load, parse, resolve
from grounding.roles import Layout, plan

JOBS = Path(__file__).parents[2] / "jobs"
LAYOUT = Layout(job_file="/run/job.yaml", data="/run/data", out="/run/out", model="/run/sft/model")


def _plan(file: str, name: str, layout: Layout = LAYOUT):
    return plan(resolve(next(j for j in load(JOBS / file) if j.metadata.name == name)), layout)


def test_the_demo_s_training() -> None:
    prepare, sft = _plan("demo.yaml", "demo-sft")
    assert prepare.argv == ("egm", "role", "prepare", "--job", "/run/job.yaml", "--data", "/run/data")
    assert sft.argv[:5] == ("egm", "role", "sft", "--job", "/run/job.yaml")
    assert sft.argv[5:] == ("--data", "/run/data", "--model", "/run/sft/model", "--out", "/run/out")
    assert sft.after == ("prepare",) and sft.gpus == 0 and sft.env["OMP_NUM_THREADS"] == "1"


def test_a_role_without_gpus_sees_none_of_the_machine_s() -> None:
    """Not an empty value: Ray refuses a logical GPU then."""
    roles = _plan("demo.yaml", "demo-sft") + _plan("demo.yaml", "demo-rl") + _plan("demo.yaml", "demo-after")
    assert {r.env["CUDA_VISIBLE_DEVICES"] for r in roles} == {"-1"}
    assert all("CUDA_VISIBLE_DEVICES" not in r.env for r in _plan("egm8b-rl.yaml", "egm8b-rl") if r.gpus)


def test_the_demo_s_evaluation() -> None:
    prepare, server, evaluate = _plan("demo.yaml", "demo-before")
    assert [r.kind for r in (prepare, server, evaluate)] == ["task", "server", "task"]
    assert server.probe is not None and server.probe.path == "/health" and "http" in server.ports
    assert server.gpus == 0 and evaluate.after == ("server",)
    assert "EGM_ENDPOINTS" not in evaluate.env


@pytest.mark.parametrize(("file", "method"), [("egm8b-rl.yaml", "rl"), ("egm4b-sft.yaml", "sft")])
def test_gpu_roles_get_gpus_and_leave_flashinfer_to_its_switch(file: str, method: str) -> None:
    role = _plan(file, file.removesuffix(".yaml"))[1]
    assert role.name == method and role.gpus == 8
    assert not flashinfer.OFF.keys() & role.env.keys()
    assert "OMP_NUM_THREADS" not in role.env


def test_a_model_on_a_hub_is_not_kept_offline() -> None:
    layout = Layout(**{**LAYOUT.__dict__, "model": "hf://JamesZGQ/EGM-8B"})
    server = _plan("egm8b-eval.yaml", "egm8b-eval", layout)[1]
    assert "HF_HUB_OFFLINE" not in server.env and server.gpus == 8


def test_endpoints_that_run_already_need_no_server() -> None:
    job = parse("""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: e}
spec: {model: {source: m}, endpoints: ["http://a:1", "http://b:2"], data: {images: [x]}}
""")[0]
    roles = plan(job, LAYOUT)
    assert [r.name for r in roles] == ["prepare", "evaluate"]
    assert roles[1].env["EGM_ENDPOINTS"] == "http://a:1,http://b:2"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.name)
def test_each_role_stands_behind_those_it_waits_for(path: Path) -> None:
    for job in load(path):
        seen: set[str] = set()
        for role in plan(resolve(job), LAYOUT):
            assert set(role.after) <= seen and role.argv[:2] == ("egm", "role")
            seen.add(role.name)
