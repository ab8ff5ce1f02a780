"""The definitions on a real API server: refusals and their messages, accepted manifests, and `kubectl explain`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from grounding.api import KINDS, ManifestError, TrainSpec, load, parse
from grounding.api.crd import crds

HERE = Path(__file__).parent
JOBS = sorted((HERE.parents[1] / "jobs").glob("*.yaml"))
INVALID = sorted((HERE / "invalid").glob("*.yaml"))


def _expected(path: Path, side: str) -> str:
    return re.search(rf"(?m)^# {side}: (.*)$", path.read_text())[1]  # type: ignore[index]


def test_there_are_enough_mistakes_to_judge_by() -> None:
    assert len(INVALID) >= 25


@pytest.fixture(scope="module")
def shared(cluster: Any) -> Iterator[Any]:
    """Return kubectl for a namespace that tests share if they leave no object, or only objects with names of their own."""
    name = f"egm-test-{secrets.token_hex(4)}"
    cluster("create", "namespace", name)
    yield dataclasses.replace(cluster, namespace=name)
    cluster("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("path", INVALID, ids=lambda p: p.stem)
def test_a_wrong_manifest_is_refused_with_a_readable_message(shared: Any, path: Path) -> None:
    # a file of two documents: the second changes the first, which is valid by itself
    *before, wrong = path.read_text().replace("{name: job}", f"{{name: {path.stem}}}").split("---\n")
    for good in before:
        shared("apply", "-f", "-", stdin=good)
    refused = shared.run("apply", "--dry-run=server", "-f", "-", stdin=wrong)
    assert refused.returncode != 0, "the API server must refuse this manifest, but it accepted it"
    assert _expected(path, "server") in refused.stderr
    assert "no such key" not in refused.stderr and "evaluation" not in refused.stderr, (
        "a CEL rule failed with an error instead of refusing"
    )


@pytest.mark.parametrize("path", INVALID, ids=lambda p: p.stem)
def test_egm_validate_refuses_the_same(path: Path) -> None:
    documents = path.read_text().split("---\n")
    if len(documents) > 1:  # the file changes a job, and both versions are valid
        assert all(parse(text) for text in documents)
        return
    with pytest.raises(ManifestError) as caught:
        load(path)
    assert _expected(path, "local") in str(caught.value)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_the_manifests_of_the_project_are_taken_and_come_back_with_the_same_meaning(kubectl: Any, path: Path) -> None:
    kubectl("apply", "-f", "-", stdin=path.read_text())
    # applying it again changes nothing: no default of the API server contradicts the manifest
    assert set(re.findall(r" (\w+)$", kubectl("apply", "-f", "-", stdin=path.read_text()), re.M)) == {"unchanged"}
    back = [parse(json.dumps(item))[0] for item in kubectl.get("gtj,gej")["items"]]
    assert {job.metadata.name: job.spec for job in back} == {job.metadata.name: job.spec for job in load(path)}


_TRAIN = {
    "apiVersion": "grounding.egm.dev/v1alpha1",
    "kind": "GroundingTrainJob",
    "metadata": {"name": "one"},
    "spec": {"preset": "tiny-rl", "data": {"shapes": {}}},
}
_EVAL = {
    **_TRAIN,
    "kind": "GroundingEvalJob",
    "spec": {"model": {"source": "/m"}, "servers": 2, "data": {"images": ["/d"]}},
}


def test_what_may_change(kubectl: Any) -> None:
    kubectl("apply", "-f", "-", stdin=_TRAIN)
    template = {"spec": {"containers": [{"name": "main", "env": [{"name": "A", "value": "b"}]}]}}
    seconds = {"activeDeadlineSeconds": 600, "startDeadlineSeconds": 300, "stallTimeoutSeconds": 600}
    changes = {
        "suspend": True,
        "maxAttempts": 9,
        "maxDisruptions": 2,
        **seconds,
        "ttlSecondsAfterFinished": 0,
        "podTemplate": template,
    }
    changes["podTemplates"] = {"train": template}
    changes["backend"] = "job"
    assert set(changes) == TrainSpec.changeable
    for name, value in changes.items():
        kubectl("patch", "gtj", "one", "--type=merge", "-p", json.dumps({"spec": {name: value}}))
        assert kubectl.get("gtj", "one")["spec"][name] == value


def test_presets_stay_the_operators(kubectl: Any) -> None:
    """The API server must not set defaults for fields of presets, because they would replace the preset's values."""
    kubectl("apply", "-f", "-", stdin={**_TRAIN, "spec": {"preset": "egm-internvl-rl", "data": {"shapes": {}}}})
    spec = kubectl.get("gtj", "one")["spec"]
    assert "prompt" not in spec["data"] and "hyperparameters" not in spec and "resources" not in spec
    assert parse(str({**_TRAIN, "spec": spec}).replace("False", "false"))[0].spec.data.prompt == "grounding"  # type: ignore[union-attr]


def test_status_and_columns(kubectl: Any) -> None:
    kubectl("apply", "-f", "-", stdin=_TRAIN)
    time = "2026-01-02T03:04:05Z"
    condition = {
        "type": "Running",
        "status": "True",
        "reason": "AllPodsRunning",
        "message": "",
        "lastTransitionTime": time,
    }
    status = {
        "observedGeneration": 1,
        "phase": "Running",
        "reason": "AllPodsRunning",
        "attempt": 2,
        "model": "tiny://",
        "conditions": [condition],
        "progress": {"step": 3, "totalSteps": 45, "percent": 6.7, "etaSeconds": 100, "time": time},
        "metrics": {"score": 0.5, "anything": 1},
        "columns": {"step": "3/45", "score": "0.500", "valAccuracy": "0.601", "eta": "1m40s", "gpuHours": "0.25"},
    }
    kubectl(
        "patch",
        "gtj",
        "one",
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps({"status": status}),
    )
    assert kubectl.get("gtj", "one")["status"] == status
    header, row = kubectl("get", "gtj").splitlines()
    assert header.split() == ["NAME", "PHASE", "STEP", "SCORE", "VAL-ACC", "ETA", "AGE"]
    assert row.split()[:6] == ["one", "Running", "3/45", "0.500", "0.601", "1m40s"]
    header, row = kubectl("get", "gtj", "-o", "wide").splitlines()
    assert header.split()[6:10] == ["REASON", "MODEL", "ATTEMPTS", "GPU-HOURS"]
    assert row.split()[6:10] == ["AllPodsRunning", "tiny://", "2", "0.25"]
    # a writer of the status cannot change the spec, nor a writer of the spec the status
    kubectl("apply", "-f", "-", stdin={**_TRAIN, "status": {"phase": "Failed"}})
    assert kubectl.get("gtj", "one")["status"]["phase"] == "Running"
    wrong = '{"status": {"phase": "Sleeping"}}'
    assert (
        "Unsupported value"
        in kubectl.run("patch", "gtj", "one", "--subresource=status", "--type=merge", "-p", wrong).stderr
    )


def test_names_category_and_scale(kubectl: Any) -> None:
    kubectl("apply", "-f", "-", stdin=_TRAIN)
    kubectl("apply", "-f", "-", stdin=_EVAL)
    assert len(kubectl("get", "egm", "-o", "name").split()) == 2
    assert kubectl("get", "gej").splitlines()[0].split() == ["NAME", "PHASE", "DONE", "ACC@0.5", "REQ/S", "ETA", "AGE"]
    kubectl("scale", "gej/one", "--replicas=4")
    assert kubectl.get("gej", "one")["spec"]["servers"] == 4


def _undescribed(schema: dict[str, Any], path: str) -> list[str]:
    found = []
    for name, inner in schema.get("properties", {}).items():
        at = f"{path}.{name}"
        if not inner.get("description"):
            found.append(at)
        found += _undescribed(inner.get("items", inner), at)
    return found


def _paths(schema: dict[str, Any], path: str) -> list[str]:
    found = [path]
    for name, inner in schema.get("properties", {}).items():
        found += _paths(inner.get("items", inner), f"{path}.{name}")
    return found


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.short_name)
def test_every_field_the_api_server_publishes_is_described(cluster: Any, kind: Any) -> None:
    document = json.loads(cluster("get", "--raw", "/openapi/v3/apis/grounding.egm.dev/v1alpha1"))
    schema = document["components"]["schemas"][f"dev.egm.grounding.v1alpha1.{kind.__name__}"]
    for part in ("spec", "status"):
        assert schema["properties"][part]["description"]
        assert _undescribed(schema["properties"][part], part) == []
        assert len(_paths(schema["properties"][part], part)) > 15
    assert cluster("explain", kind.short_name, "--recursive").count("\n") > 60


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gtj", "Trains a grounding model"),
        ("gtj.spec", "What to train, on which data and resources, and how"),
        ("gtj.spec.reward", "Weight of passing; 1 - alpha is the weight of the IoU"),
        ("gtj.spec.reward.type", "ENUM: mix sigmoid"),
        ("gtj.spec.hyperparameters.learningRate", "Peak learning rate"),
        ("gtj.spec.resources.tolerations", "A Kubernetes toleration"),
        ("gtj.status.conditions.reason", "closed list"),
        ("gej.spec.sampling", "Maximum length of an answer in tokens"),
        ("gej.status.accuracy.files", "Stem of the file"),
    ],
)
def test_kubectl_explain_is_useful(cluster: Any, path: str, words: str) -> None:
    text = " ".join(cluster("explain", path).split())
    assert words in text and "<no description>" not in text


def _verdict(spec: dict[str, Any], kind: str) -> bool:
    """Return whether the models accept a spec after its preset is filled in."""
    try:
        parse(json.dumps({**_TRAIN, "kind": kind, "spec": spec}))
    except ManifestError:
        return False
    return True


def test_server_and_models_judge_alike(shared: Any) -> None:
    """The models and the API server accept the same combinations of the fields that rules name."""
    options: dict[str, list[Any]] = {
        "method": [None, "sft", "rl"],
        "preset": [None, "tiny-sft", "tiny-rl"],
        "model": [None, {}, {"source": "/m"}, {"trainJob": "a"}],
        "reward": [None, {}, {"alpha": 1}],
        "data": [
            None,
            {},
            {"shapes": {}},
            {"train": ["a.parquet"]},
            {"train": ["a.parquet"], "validation": ["b.parquet"]},
            {"prepared": "p"},
            {"train": [], "shapes": {}},
            {"train": ["a.parquet"], "shapes": {}},
            {"prepared": "p", "shapes": {}},
        ],
    }
    drawn = random.Random(7)
    combinations = list(itertools.product(*options.values()))
    specs = [
        {k: v for k, v in zip(options, values, strict=True) if v is not None}
        for values in drawn.sample(combinations, 240)
    ]
    items = [{**_TRAIN, "metadata": {"name": f"c{i}"}, "spec": spec} for i, spec in enumerate(specs)]
    done = shared.run(
        "create", "--dry-run=server", "-f", "-", "-o", "name", stdin="\n---\n".join(map(json.dumps, items))
    )
    taken = {int(line.rsplit("/c", 1)[1]) for line in done.stdout.split()}
    ours = {i for i, spec in enumerate(specs) if _verdict(spec, "GroundingTrainJob")}
    assert 20 < len(ours) < 200
    assert [specs[i] for i in sorted(taken ^ ours)] == []


def test_the_definitions_are_ours() -> None:
    assert {c["spec"]["names"]["shortNames"][0] for c in crds().values()} == {"gtj", "gej"}
    with pytest.raises(ValidationError):
        KINDS["GroundingTrainJob"].model_validate({})
