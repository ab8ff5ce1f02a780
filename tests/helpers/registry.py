"""A registry of images for tests: Debian's docker-registry on loopback, without TLS and accounts."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / ".cache/registry/usr/bin/docker-registry"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach this machine's 127.0.0.1


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run an empty registry that stores its files in `folder`; yield HOST:PORT. Skips the test if the program is missing."""
    program = shutil.which("docker-registry") or (str(PROGRAM) if PROGRAM.exists() else None)
    if program is None:
        pytest.skip("no docker-registry: `make registry`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config, log = folder / "registry.yml", folder / "registry.log"
    storage = f"storage: {{filesystem: {{rootdirectory: {folder / 'blobs'}}}}}"
    config.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '{address}'}}\n")
    with log.open("w") as out:
        process = subprocess.Popen([program, "serve", str(config)], stdout=out, stderr=out)
    try:
        for _ in range(300):
            try:
                DIRECT.open(f"http://{address}/v2/").close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail(f"no answer from the registry:\n{log.read_text()}")
        yield address
    finally:
        process.terminate()
        process.wait()
