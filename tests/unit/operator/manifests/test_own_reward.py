"""A reward file from the submitting machine: its ConfigMap, and the pods that mount it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import orjson
import pytest
from egm_operator.manifests import own_reward
from egm_operator.render import objects, render
from egm_operator.settings import Settings
from ruamel.yaml import YAML

from grounding.api import ResolvedTrainJob, parse
from grounding.errors import UserError

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: NAME}
spec:
  preset: egm-8b-rl
  output: OUTPUT
  data: {prepared: /rows}
  reward: {file: FILE, entryPoint: mine, threshold: 0.75}
"""
CODE = "def mine(data_source, solution_str, ground_truth, extra_info):\n    return 1.0\n"


def _file(folder: Path, content: bytes = CODE.encode()) -> Path:
    file = folder / "mine.py"
    file.write_bytes(content)
    return file


def _job(file: str | Path, name: str = "rl", output: str = "s3://b/o") -> ResolvedTrainJob:
    [job] = parse(JOB.replace("NAME", name).replace("FILE", str(file)).replace("OUTPUT", output))
    assert isinstance(job, ResolvedTrainJob)
    return job


def _config(file: Path, name: str = "rl", namespace: str = "ns") -> dict[str, Any]:
    return own_reward.config_map(name, namespace, file)


@pytest.mark.parametrize("output", ["s3://b/o", "pvc://claim/o"])
def test_pods_mount_it_and_read_it_as_a_file(tmp_path: Path, output: str) -> None:
    job, config = own_reward.in_config_map(_job(_file(tmp_path), output=output), "ns")
    assert config is not None and config["data"] == {"reward.py": CODE} and config["immutable"] is True
    made = objects(job, {}, Settings(), "ns")
    templates = [o["spec"]["template"] for o in made if o["kind"] == "Job"]
    templates += [o["spec"]["pytorchReplicaSpecs"]["Master"]["template"] for o in made if o["kind"] == "PyTorchJob"]
    assert len(templates) == (2 if output.startswith("pvc") else 1)
    for template in templates:
        [volume] = [v for v in template["spec"]["volumes"] if "configMap" in v]
        assert volume["configMap"]["name"] == config["metadata"]["name"]
        assert volume["configMap"]["items"] == [{"key": "reward.py", "path": "reward.py"}]
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
            mount = {"name": volume["name"], "mountPath": "/egm/reward", "readOnly": True}
            assert mount in container["volumeMounts"]
        seen = orjson.loads(template["metadata"]["annotations"]["grounding.egm.dev/job.yaml"])["spec"]["reward"]
        assert seen == {"file": "/egm/reward/reward.py", "entryPoint": "mine", "threshold": 0.75}


def test_the_name_is_that_of_the_job_and_of_the_content(tmp_path: Path) -> None:
    def name(**changed: Any) -> str:
        return str(_config(_file(tmp_path, changed.pop("content", b"x = 1\n")), **changed)["metadata"]["name"])

    first = name()
    assert first == name() and first.startswith("rl-reward-")
    others = {name(content=b"x = 2\n"), name(name="other"), name(name="rl-reward"), name(name="r" * 63)}
    assert first not in others and len(others) == 4 and all(len(each) <= 63 for each in others)
    labels = _config(_file(tmp_path))["metadata"]["labels"]
    assert (labels["grounding.egm.dev/job"], labels["grounding.egm.dev/kind"]) == ("rl", "train")


def test_a_file_that_is_too_large_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert _config(_file(tmp_path, b"#" * own_reward.LIMIT))
    with pytest.raises(UserError, match="a ConfigMap can have at most") as caught:
        own_reward.in_config_map(_job(_file(tmp_path, b"#" * (own_reward.LIMIT + 1))), "ns")
    assert caught.value.field == "spec.reward.file" and "pvc://" in caught.value.hint


def test_any_bytes_arrive_as_they_are(tmp_path: Path) -> None:
    content = "# coding: latin-1\nname = 'é'\n".encode("latin-1")
    config = _config(_file(tmp_path, content))
    assert "data" not in config and base64.b64decode(config["binaryData"]["reward.py"]) == content


@pytest.mark.parametrize("place", ["pvc://c/r.py", "s3://b/r.py", "hf://o/n/r.py", "/no/such/r.py"])
def test_a_place_that_pods_see_stays_as_it_is(place: str) -> None:
    job = _job(place)
    assert own_reward.in_config_map(job, "ns") == (job, None)


def test_a_relative_path_that_is_not_here_is_refused() -> None:
    with pytest.raises(UserError, match="a pod has no folder") as caught:
        objects(_job("no/such.py"), {}, Settings(), "ns")
    assert "egm submit" in caught.value.hint


def test_render_prints_the_config_map_first(tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(
        JOB.replace("NAME", "rl").replace("FILE", _file(tmp_path).as_uri()).replace("OUTPUT", "s3://b/o")
    )
    first = next(iter(YAML(typ="safe", pure=True).load_all(render([manifest], Settings(), "ns"))))
    assert (first["kind"], first["metadata"]["namespace"]) == ("ConfigMap", "ns")
