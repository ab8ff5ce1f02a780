"""`make push` says what is wrong before it pushes anything. tests/images/test_push.py pushes to a real registry."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _push(registry: str | None, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Push with a buildah that has no image."""
    buildah = folder / "buildah"
    buildah.write_text("#!/bin/sh\nexit 125\n")
    buildah.chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["bash", "images/push.sh", *([] if registry is None else [registry])]
    return subprocess.run(words, cwd=ROOT, env=os.environ | path | environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    "registry", ["", "https://registry.example.org/egm", "Registry.example.org", "host:80/egm:tag"]
)
def test_a_registry_is_a_host_and_a_path(registry: str, tmp_path: Path) -> None:
    done = _push(registry, tmp_path)
    assert done.returncode == 2 and "expected REGISTRY=HOST[:PORT][/PATH]" in done.stderr and not done.stdout


@pytest.mark.parametrize("registry", ["myteam", "registry/egm", "registry/egm.v2/", "localhosts/egm"])
def test_a_first_part_that_stands_for_a_path_on_docker_io_is_refused(registry: str, tmp_path: Path) -> None:
    done = _push(registry, tmp_path)
    assert done.returncode == 2 and f"would be docker.io/{registry.rstrip('/')}; add the host" in done.stderr


@pytest.mark.parametrize("registry", ["localhost/egm", "localhost:5000", "host:80/egm", "docker.io/myteam", "10.0.0.1"])
def test_a_host_is_localhost_or_has_a_dot_or_a_port(registry: str, tmp_path: Path) -> None:
    assert "there is no image" in _push(registry, tmp_path).stderr


def test_a_call_without_a_registry_prints_the_usage(tmp_path: Path) -> None:
    done = _push(None, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: images/push.sh REGISTRY")


@pytest.mark.parametrize(
    ("environ", "image", "cure"),
    [
        ({}, "localhost/egm-operator:dev", "make images VARIANT=cpu`"),
        ({"VARIANT": "gpu"}, "localhost/egm-operator:dev", "make images VARIANT=gpu ENGINE=sglang`"),
        ({"VARIANT": "gpu", "ENGINE": "vllm", "TAG": "v2"}, "egm-operator:v2", "VARIANT=gpu ENGINE=vllm TAG=v2`"),
    ],
)
def test_a_missing_image_is_named_with_the_command_that_builds_it(
    environ: dict[str, str], image: str, cure: str, tmp_path: Path
) -> None:
    done = _push("host:5000/egm/", tmp_path, **environ)
    assert done.returncode == 2 and image in done.stderr and cure in done.stderr and not done.stdout


def test_a_wrong_variant_or_engine_is_refused(tmp_path: Path) -> None:
    assert "expected VARIANT=cpu or gpu, found tpu" in _push("localhost", tmp_path, VARIANT="tpu").stderr
    assert "expected ENGINE=sglang or vllm, found other" in _push("localhost", tmp_path, ENGINE="other").stderr
