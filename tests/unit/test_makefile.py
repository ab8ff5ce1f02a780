"""The set-up by make: what a person sees first, and the certificates that it trusts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")


def test_the_set_up_says_what_it_does_before_its_first_slow_step(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" != -m ]\n')  # makes no virtual environment
    python.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["make", "-s", ".cache/installer/bin/uv"]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.startswith("installing uv ")
    assert done.returncode == 2 and "apt-get install python3-venv" in done.stderr


def test_the_demo_says_what_it_runs_before_its_imports() -> None:
    lines = subprocess.run(["make", "-sn", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said, runs = lines.splitlines()[-2:]
    assert said.startswith('echo "running jobs/demo.yaml') and runs == ".venv/bin/egm run -f jobs/demo.yaml"


@pytest.mark.skipif(bool(shutil.which("docker-registry")), reason="the registry is installed")
def test_the_tests_of_the_images_run_without_the_registry_if_it_cannot_be_downloaded(tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\nexit 100\n")
    apt.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["make", "-s", "registry", f"REGISTRY_PROGRAM={tmp_path}/registry"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "test of make push will be skipped" in done.stdout


@pytest.mark.skipif(not any(map(os.path.exists, BUNDLES)), reason="this system has no list of certificates")
def test_the_set_up_trusts_the_certificates_of_the_system() -> None:
    words = ["make", "-s", "--eval", "certificates: ; @printenv UV_SYSTEM_CERTS", "certificates"]
    environ = {k: v for k, v in os.environ.items() if k != "UV_SYSTEM_CERTS"}
    assert subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True).stdout == "true\n"
