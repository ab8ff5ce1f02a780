"""Images that buildah builds and runs without a daemon. These tests need root and run only by name (`make test-images`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAG = "test"


def call(*words: str, timeout: float = 1800, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output; never raises for an exit code."""
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, **more)


def told(*words: str) -> Any:
    """Return the JSON that a command prints."""
    done = call(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass
class Image:
    """A built image with a container, in which `run` runs commands."""

    name: str
    container: str
    root: Path
    seconds: float

    def run(self, *words: str, user: str = "10001:10001", timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in the image, with the image's user and environment."""
        return call(
            "buildah", "run", "--isolation", "chroot", "--user", user, self.container, "--", *words, timeout=timeout
        )

    @property
    def config(self) -> dict[str, Any]:
        """Return the image's OCI configuration."""
        return told("buildah", "inspect", "--type", "image", self.name)["OCIv1"]

    @property
    def layers(self) -> list[str]:
        """Return the digests of the image's unpacked layers."""
        return list(self.config["rootfs"]["diff_ids"])


def build(what: str, tag: str = TAG, tree: Path = ROOT, **environ: str) -> tuple[str, float]:
    """Build an image with `make`; return its name and the seconds that it took."""
    began = time.monotonic()
    done = call(
        str(tree / "images" / "build.sh"), what, env=os.environ | {"VARIANT": "cpu", "TAG": tag} | environ, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1], time.monotonic() - began


@pytest.fixture(scope="session")
def images() -> Iterator[Callable[[str], Image]]:
    """Return a function that builds an image at its first call."""
    if os.geteuid() != 0 or not shutil.which("buildah"):
        pytest.skip("needs root and buildah")
    made: dict[str, Image] = {}

    def get(what: str) -> Image:
        if what not in made:
            name, seconds = build(what)
            container = call("buildah", "from", "--pull-never", name).stdout.strip()
            made[what] = Image(name, container, Path(call("buildah", "mount", container).stdout.strip()), seconds)
            print(f"\n{name}: built in {seconds:.0f} s")
        return made[what]

    yield get
    for image in made.values():
        call("buildah", "rm", image.container)
