"""`make push` to a real registry: Debian's docker-registry, without TLS."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry import DIRECT, registry

from .conftest import ROOT, call

TAGS = {"operator": "push", "train": "push-gpu", "infer": "push-vllm"}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Start an empty registry and yield its HOST:PORT."""
    with registry(tmp_path) as found:
        yield found


@pytest.fixture
def built(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Build three small images with the names of a build for GPUs with vLLM, and remove them at the end."""
    if os.geteuid() != 0 or not shutil.which("buildah"):
        pytest.skip("needs root and buildah")
    names = {what: f"egm-{what}:{tag}" for what, tag in TAGS.items()}
    for what, name in names.items():
        container = call("buildah", "from", "scratch").stdout.strip()
        (tmp_path / what).write_text(what)
        call("buildah", "copy", container, str(tmp_path / what), f"/{what}")
        assert call("buildah", "commit", "--rm", container, f"localhost/{name}").returncode == 0
    yield names
    call("buildah", "rmi", *(f"localhost/{n}" for n in names.values()))


def test_pushed_images_are_in_the_registry_and_the_command_for_the_chart_is_printed(
    address: str, built: dict[str, str]
) -> None:
    words = ["make", "-s", "push", f"REGISTRY={address}/team", "VARIANT=gpu", "ENGINE=vllm", "TAG=push"]
    refused = call(*words, cwd=ROOT)
    assert refused.returncode != 0 and "add INSECURE=1" in refused.stderr
    done = call(*words, "INSECURE=1", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    values = f"image.registry={address}/team,image.tag=push,image.variant=gpu,image.engine=vllm"
    assert done.stdout.endswith(f"helm install egm charts/egm --namespace egm --create-namespace --set {values}\n")
    for what, tag in TAGS.items():
        with DIRECT.open(f"http://{address}/v2/team/egm-{what}/tags/list") as answer:
            assert json.load(answer) == {"name": f"team/egm-{what}", "tags": [tag]}
        assert f"pushing {address}/team/{built[what]}\n" in done.stdout
