"""`make push` to a real registry: Debian's docker-registry, without TLS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, call

PROGRAM = ROOT / ".cache/registry/usr/bin/docker-registry"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach this machine's 127.0.0.1
TAGS = {"operator": "push", "train": "push-gpu", "infer": "push-vllm"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Start an empty registry and yield its HOST:PORT."""
    program = shutil.which("docker-registry") or (str(PROGRAM) if PROGRAM.exists() else None)
    if program is None:
        pytest.skip("no docker-registry: `make registry`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    storage = f"storage: {{filesystem: {{rootdirectory: {tmp_path / 'blobs'}}}}}"
    config.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '{address}'}}\n")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                DIRECT.open(f"http://{address}/v2/").close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        else:
            pytest.fail(f"no answer from the registry:\n{(tmp_path / 'log').read_text()}")
        yield address
    finally:
        process.terminate()
        process.wait()


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
    registry: str, built: dict[str, str]
) -> None:
    words = ["make", "-s", "push", f"REGISTRY={registry}/team", "VARIANT=gpu", "ENGINE=vllm", "TAG=push"]
    refused = call(*words, cwd=ROOT)
    assert refused.returncode != 0 and "add INSECURE=1" in refused.stderr
    done = call(*words, "INSECURE=1", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    values = f"image.registry={registry}/team,image.tag=push,image.variant=gpu,image.engine=vllm"
    assert done.stdout.endswith(f"helm install egm charts/egm --namespace egm --create-namespace --set {values}\n")
    for what, tag in TAGS.items():
        with DIRECT.open(f"http://{registry}/v2/team/egm-{what}/tags/list") as answer:
            assert json.load(answer) == {"name": f"team/egm-{what}", "tags": [tag]}
        assert f"pushing {registry}/team/{built[what]}\n" in done.stdout
