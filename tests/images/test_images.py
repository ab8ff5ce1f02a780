"""The three images are small, contain no secrets and setuid files, are reproducible, and work as any user."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from by_path import module

from .conftest import ROOT, Image, build, call

Images = Callable[[str], Image]
LOCKS = module(ROOT / "images" / "locks.py").LOCKS
EVERY = pytest.mark.parametrize("what", ["operator", "infer", "train"])
pytestmark = pytest.mark.timeout(3600)

LOCK = {"operator": "operator", "infer": "infer-transformers-cpu", "train": "train-cpu"}
JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: look}
spec: {engine: transformers, model: {source: 'tiny://'}, data: {shapes: {}}}
"""
SECRETS = re.compile(
    rb"-----BEGIN (RSA |EC |OPENSSH |)PRIVATE KEY-----|AKIA[0-9A-Z]{16}|ghp_[0-9A-Za-z]{36}|hf_[0-9A-Za-z]{34}|sk-[0-9A-Za-z]{40,}"
)


@EVERY
def test_every_entry_module_imports(images: Images, what: str) -> None:
    entries = next(x.entries for x in LOCKS if x.name == LOCK[what])
    done = images(what).run(
        "python", "-c", "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *entries
    )
    assert entries
    assert done.returncode == 0, done.stderr[-3000:]


@EVERY
def test_it_is_what_a_restricted_pod_wants(images: Images, what: str) -> None:
    image = images(what)
    config = image.config["config"]
    assert config["User"] == "10001:10001" and config["Entrypoint"] == ["tini", "--"]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and config["Labels"]["org.opencontainers.image.version"] == version[1]
    found = call("find", str(image.root), "-xdev", "-type", "f", "-perm", "/6000")
    assert found.returncode == 0 and found.stdout == ""
    loose = call(
        "find",
        str(image.root / "opt/egm"),
        "-xdev",
        "!",
        "-type",
        "l",
        "(",
        "-perm",
        "/022",
        "-o",
        "!",
        "-perm",
        "-o+r",
        "-o",
        "!",
        "-uid",
        "0",
        ")",
    )
    assert loose.returncode == 0 and loose.stdout == ""
    assert (
        image.run("sh", "-c", "touch /opt/egm/x 2>/dev/null || touch /etc/x 2>/dev/null || id -u").stdout.strip()
        == "10001"
    )


@EVERY
def test_no_secret_and_nothing_of_the_machine_is_in_it(images: Images, what: str) -> None:
    image = images(what)
    bad = []
    packages = next((image.root / "opt/egm/lib").glob("python3.*")) / "site-packages"
    ours = [
        *packages.glob("grounding/**/*"),
        *packages.glob("egm_operator/**/*"),
        *(image.root / "etc").rglob("*"),
        *(image.root / "root").rglob("*"),
    ]
    for path in ours:
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if SECRETS.search(data) or str(ROOT).encode() in data:
                bad.append(str(path.relative_to(image.root)))
    assert len(ours) > 200 and bad == []
    assert not SECRETS.search(json.dumps(image.config).encode())
    assert (
        not list((image.root / "var/cache/uv").glob("*"))
        and not (image.root / "tools").exists()
        and not (image.root / "src").exists()
    )


@EVERY
def test_its_bill_of_materials_names_what_is_in_it(images: Images, what: str) -> None:
    image = images(what)
    bill = json.loads((image.root / "opt/egm/sbom.cdx.json").read_text())
    assert (
        bill["bomFormat"] == "CycloneDX"
        and bill["specVersion"] == "1.6"
        and re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    )
    names = {c["purl"].split("@")[0] for c in bill["components"]}
    lock = next(x.path for x in LOCKS if x.name == LOCK[what])
    locked = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", lock.read_text(), re.MULTILINE)
    assert {f"pkg:pypi/{n.replace('.', '-')}" for n in locked} == {n for n in names if n.startswith("pkg:pypi/")}
    assert {"pkg:deb/debian/libc6", "pkg:deb/debian/tini"} <= names


def test_the_operators_image_is_small(images: Images) -> None:
    image = images("operator")
    size = int(call("du", "-sxB1", str(image.root)).stdout.split()[0])
    print(f"operator: {size / 1e6:.0f} MB unpacked")
    assert size < 200e6


def test_the_operator_starts_and_says_what_it_lacks(images: Images) -> None:
    done = images("operator").run("tini", "-s", "--", "env", "KUBECONFIG=/nowhere", "python", "-m", "egm_operator")
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stderr.strip(), done.stderr[-2000:]


def test_prepare_runs_as_any_user(images: Images) -> None:
    image = images("train")
    (image.root / "tmp" / "job.yaml").write_text(JOB)
    done = image.run(
        "tini",
        "-s",
        "--",
        "egm",
        "role",
        "prepare",
        "--job",
        "/tmp/job.yaml",
        "--data",
        "/tmp/any/data",
        user="23456:23456",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prepare of evaluation job look; CPU" in done.stderr and list((image.root / "tmp/any/data").rglob("*.jsonl"))


def test_the_server_answers_as_any_user(images: Images) -> None:
    """Start the real server of transformers with the tiny model, as in a pod; the command `timeout` stops it, as a kubelet would."""
    image = images("infer")
    (image.root / "tmp" / "job.yaml").write_text(JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["env", f"EGM_PORT={port}", "HF_HUB_OFFLINE=1", "timeout", "150", "tini", "-s", "--"]
    words += ["egm", "role", "server", "--job", "/tmp/job.yaml", "--data", "/tmp/data", "--model", "tiny://"]
    began, answered = time.monotonic(), 0.0
    with ThreadPoolExecutor() as pool:
        run = pool.submit(image.run, *words, user="23456:23456")
        while not run.done():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                    answered = answered or (time.monotonic() - began) * (answer.status == 200)
            except OSError:
                pass
            time.sleep(1)
        done = run.result()
    print(f"infer: the server answered after {answered:.0f} s")
    assert answered and done.returncode == 124, done.stderr[-3000:]
    assert "server of evaluation job look; transformers on port" in done.stderr


def _tree(target: Path) -> Path:
    """Copy the sources from which the images are built; return the folder."""
    for name in ("images", "grounding", "operator"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore", "Dockerfile.train", "Dockerfile.infer"):
        shutil.copy2(ROOT / name, target / name)
    return target


@EVERY
def test_a_change_of_code_is_the_last_layer_alone(images: Images, what: str, tmp_path: Path) -> None:
    before, tree = images(what), _tree(tmp_path)
    with (tree / "grounding" / "boxes.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    name, seconds = build(what, "changed", tree)
    print(f"{what}: a change of code took {seconds:.0f} s")
    after = Image(name, "", Path(), 0).layers
    call("buildah", "rmi", name)
    assert after[:-1] == before.layers[:-1] and after[-1] != before.layers[-1]


def test_built_again_from_nothing_the_layers_are_the_same(images: Images, tmp_path: Path) -> None:
    name, _ = build("operator", "again", NO_CACHE="1")
    again = Image(name, "", Path(), 0).layers
    call("buildah", "rmi", name)
    assert again == images("operator").layers


def test_a_base_that_lacks_something_fails_at_once_and_by_name(tmp_path: Path, images: Images) -> None:
    images("operator")
    container = call("buildah", "from", "--pull-never", "localhost/egm-base:bookworm").stdout.strip()
    call("buildah", "run", "--isolation", "chroot", container, "--", "rm", "/usr/bin/tini")
    call("buildah", "commit", container, "localhost/egm-bare:test")
    call("buildah", "rm", container)
    done = call(
        str(ROOT / "images/build.sh"),
        "operator",
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "BASE": "localhost/egm-bare:test",
            "TAG": "bare",
        },
    )
    call("buildah", "rmi", "localhost/egm-bare:test")
    assert done.returncode != 0 and "error: BASE has no tini" in done.stdout + done.stderr


def test_a_wrong_argument_is_told() -> None:
    for words, environ, said in (
        (["nothing"], {}, "expected operator, train or infer, found nothing"),
        (["train"], {"VARIANT": "tpu"}, "expected VARIANT=cpu or gpu, found tpu"),
        (["infer"], {"ENGINE": "other"}, "expected ENGINE=sglang or vllm, found other"),
    ):
        done = call(
            str(ROOT / "images/build.sh"),
            *words,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **environ},
        )
        assert done.returncode == 2 and said in done.stderr
