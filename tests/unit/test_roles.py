"""From a job to roles, as tables: which roles run, their arguments and their order."""

from dataclasses import replace
from pathlib import Path

import pytest

from grounding.api import check_references, load, parse, resolve
from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.local.gpus import gpus_of
from grounding.roles import Layout, plan
from grounding.runtime import flashinfer

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
    """`CUDA_VISIBLE_DEVICES` is -1 and not empty, because Ray refuses a logical GPU if it is empty."""
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
        layout = replace(LAYOUT, models=tuple(f"/run/{n}/model" for n, _ in enumerate(job.spec.models)))
        for role in plan(resolve(job), layout):
            assert set(role.after) <= seen and role.argv[:2] == ("egm", "role")
            seen.add(role.name)


SWEEP = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: s}
spec:
  servers: 2
  gpusPerServer: 4
  data: {images: [i]}
  sampling: {temperature: 0.7}
  sweep:
    models: [{source: hf://a/EGM-4B}, {trainJob: mine}, {source: /b/egm-4b, trustRemoteCode: true}]
    samples: [1, 4]
"""


def test_the_models_of_a_sweep_are_served_one_after_the_other() -> None:
    job = resolve(parse(SWEEP)[0])
    assert job.spec.several_models == ["egm-4b", "mine", "egm-4b-2"]
    layout = Layout(**{**LAYOUT.__dict__, "models": ("hf://a/EGM-4B", "/run/mine/model", "/b/egm-4b")})
    roles = plan(job, layout)
    assert [(r.name, r.after) for r in roles] == [
        ("prepare", ()),
        ("server-egm-4b", ("prepare",)),
        ("evaluate-egm-4b", ("server-egm-4b",)),
        ("server-mine", ("evaluate-egm-4b",)),
        ("evaluate-mine", ("server-mine",)),
        ("server-egm-4b-2", ("evaluate-mine",)),
        ("evaluate-egm-4b-2", ("server-egm-4b-2",)),
    ]
    assert [r.argv[r.argv.index("--model") + 1] for r in roles if r.kind == "server"] == list(layout.models)
    named = [r.argv[r.argv.index("--only-model") + 1] for r in roles[1:]]
    assert named == [n for n in job.spec.several_models for _ in "ab"]
    assert gpus_of(roles) == 8  # not three times as many
    assert "HF_HUB_OFFLINE" not in roles[1].env and roles[3].env["HF_HUB_OFFLINE"] == "1"
    one = job.spec.of_model("egm-4b-2")
    assert (one.model.source, one.model.trust_remote_code, one.several_models) == ("/b/egm-4b", True, [])
    assert one.sweep is not None and one.sweep.samples == [1, 4]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hf://a/EGM-4B", "/b/egm-4b", "a model is listed twice"),
        ("{trainJob: mine}", "{family: internvl}", "each model needs one of source and trainJob"),
        ("  servers: 2", "  model: {source: /c}", "model is not one of sweep.models"),
        ("  servers: 2", "  endpoints: ['http://h:1']", "the job starts no servers"),
        ("  samples: [1, 4]", "  samples: [1, 4]\n    settings: [{samples: 2}]", "settings excludes thinkingBudgets"),
        ("temperature: 0.7}", "temperature: 0}", "sweep.samples needs a sampling.temperature"),
        ("samples: [1, 4]", "settings: [{}]\n  model: {}", ""),
        ("  servers: 2", "  model: {trainJob: mine}", ""),
    ],
)
def test_sweeps_that_cannot_be_meant_are_refused(old: str, new: str, said: str) -> None:
    assert old in SWEEP
    if not said:
        assert parse(SWEEP.replace(old, new))[0].spec.several_models
        return
    with pytest.raises(UserError, match=said):
        parse(SWEEP.replace(old, new))


def test_a_sweep_waits_for_every_training_of_its_models() -> None:
    with pytest.raises(UserError, match="'mine' is not a GroundingTrainJob of this file") as caught:
        check_references([resolve(job) for job in parse(SWEEP)])
    assert caught.value.field == "GroundingEvalJob s: spec.sweep.models.1.trainJob"


@pytest.mark.parametrize(
    ("role", "spec", "words"),
    [
        ("sft", "{preset: tiny-rl, data: {shapes: {}}}", "spec.method: is rl, and this role is sft"),
        ("rl", "{preset: tiny-sft, data: {shapes: {}}}", "spec.method: is sft, and this role is rl"),
        (
            "rl",
            "{preset: tiny-rl, data: {shapes: {}}, reward: {configMap: {name: a, key: r.py}}}",
            "spec.reward.configMap: is mounted only in the pods of a cluster",
        ),
    ],
)
def test_a_role_refuses_the_job_of_another_one(
    role: str, spec: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingTrainJob\nmetadata: {{name: a}}\nspec: {spec}\n"
    )
    where = ["--data", str(tmp_path / "d"), "--model", "m", "--out", str(tmp_path / "o")]
    assert egm(["role", role, "--job", str(job), *where]) == 2
    assert words in capsys.readouterr().err
