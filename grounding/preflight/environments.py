"""Environments for a machine with GPUs, installed from the locks of the images: `.venv-train`, and `.venv-sglang` or `.venv-vllm`.

The engines and training need versions that exclude each other, so each has its own environment. `steps` is pure.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grounding.errors import Failure, UserError
from grounding.evaluate.engines import ENGINES
from grounding.preflight.needs import TRAIN_LOCK, engine_folder, train_folder
from grounding.preflight.probe import gpus
from grounding.runtime.environment import Environment
from grounding.storage import in_words

SIZE = 13_000_000_000
"""Bytes that an environment needs on its disk at most; that of training has 11.2 GB"""
PYTHONS = ((3, 11), (3, 12))
GLIBC = (2, 34)
BUILD = "images/build/requirements.txt"
CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")
"""The system's list of certificates on Debian, RHEL and SUSE, as in the Makefile"""
_MARK = ".egm-lock"


@dataclass(frozen=True)
class Target:
    """An environment: its folder, its lock, and whether it also has this project, which training imports."""

    folder: Path
    lock: Path
    project: bool


def engines() -> list[str]:
    """Return the engines that have a lock."""
    return [name for name, engine in ENGINES.items() if engine.lock]


def checkout() -> Path:
    """Return the folder of the checkout, which has the locks. Raises `UserError` if there is none."""
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / TRAIN_LOCK).is_file():
            return folder
    raise UserError(f"no checkout has {TRAIN_LOCK}", hint="Run this command in the folder of the checkout.")


def targets(root: Path, engine: str) -> list[Target]:
    """Return the environments for training and for an engine. Pure."""
    lock = ENGINES[engine].lock
    return [
        Target(root / train_folder(), root / TRAIN_LOCK, project=True),
        Target(root / engine_folder(engine), root / lock, project=False),
    ]


def steps(target: Target, root: Path, uv: str, python: str) -> list[list[str]]:
    """Return the commands that create an environment; each can be repeated. Pure."""
    # --no-config: the project's own configuration leaves out packages that only GPUs need
    install = [uv, "pip", "install", "--no-config", "--python", str(target.folder / "bin" / "python"), "--no-deps"]
    found = [
        [uv, "venv", "--quiet", "--no-config", "--allow-existing", "--python", python, str(target.folder)],
        [*install, "--require-hashes", "--build-constraints", str(root / BUILD), "-r", str(target.lock)],
    ]
    return [*found, [*install, "--editable", str(root)]] if target.project else found


def _state(target: Target) -> str:
    return hashlib.sha256(target.lock.read_bytes()).hexdigest()


def complete(target: Target) -> bool:
    """Return whether an earlier call has installed this version of the lock."""
    mark = target.folder / _MARK
    return mark.is_file() and mark.read_text() == _state(target)


def _to_install(target: Target) -> int:
    """Return the bytes that an environment still needs at most, without what a failed or older installation has left."""
    if complete(target):
        return 0
    return max(0, SIZE - sum(p.lstat().st_size for p in target.folder.rglob("*") if p.is_file()))


def _uv(root: Path) -> str:
    own = root / ".cache/installer/bin/uv"
    found = str(own) if own.is_file() else shutil.which("uv")
    if not found:
        raise UserError("uv is not installed", hint="`make setup` in the checkout installs it.")
    return found


@dataclass(frozen=True)
class Host:
    """The facts about a machine that decide whether it can have the environments.

    `free`: bytes on the disk of the checkout. `driver`: whether there is an NVIDIA driver, which is needed later.
    """

    system: str
    glibc: tuple[int, ...]
    python: tuple[int, int]
    free: int
    driver: bool = True


def host(root: Path) -> Host:
    """Return the facts about this machine."""
    glibc = tuple(int(n) for n in platform.libc_ver()[1].split(".")[:2] if n.isdigit())
    system = f"{sys.platform} on {platform.machine()}"
    found = gpus()
    driver = bool(found.driver or found.problem) or found.cuda is not None
    return Host(system, glibc, sys.version_info[:2], shutil.disk_usage(root).free, driver)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version)) or "none"


def refuse(found: Host, root: Path, size: int) -> None:
    """Raise `UserError` if the locks do not fit the machine, or environments of `size` bytes its disk. Pure."""
    if found.system != "linux on x86_64":
        raise UserError(f"the locks are for Linux on x86-64; this machine is {found.system}")
    if found.glibc < GLIBC:
        hint = "Use Debian 12, Ubuntu 22.04, RHEL 9 or newer, or the images (docs/images.md)."
        text = f"the engines need glibc {_dotted(GLIBC)} or newer; this machine has {_dotted(found.glibc)}"
        raise UserError(text, hint=hint)
    if found.python not in PYTHONS:
        hint = "Run it with the egm of an environment of Python 3.11 or 3.12."
        raise UserError(f"the locks are for Python 3.11 and 3.12; this is {_dotted(found.python)}", hint=hint)
    if found.free < size:
        text = f"{in_words(found.free)} are free, but the environments need up to {in_words(size)}"
        raise UserError(text, file=root, hint="Free some space, or use a checkout on another disk.")


def _environ() -> dict[str, str]:
    """Return the environment of uv, which trusts only its own list of certificates unless the user or this function decides otherwise."""
    certificates = {"UV_SYSTEM_CERTS": "true"} if any(map(os.path.exists, CERTIFICATES)) else {}
    return certificates | os.environ | {"UV_PYTHON_DOWNLOADS": "never"}


def _run(words: Sequence[str], say: Callable[[str], None]) -> None:
    code = subprocess.run(words, env=_environ()).returncode
    if code:
        say(f"failed: {' '.join(words)}")
        hint = "The lines above say why. The same command continues: downloaded packages are kept."
        raise Failure(f"{Path(words[0]).name} ended with exit code {code}", hint=hint)


def setup(engine: str, *, dry_run: bool, say: Callable[[str], None]) -> None:
    """Create the environments that do not exist yet, and print how to use them.

    With `dry_run`, print the commands instead. Raises `UserError` if the machine cannot have them, before anything is downloaded.
    """
    root = checkout()
    wanted = targets(root, engine)
    sizes = {target: _to_install(target) for target in wanted}
    left = [t for t in wanted if not complete(t)]
    for target in wanted:
        lock = target.lock.relative_to(root)
        done = "already installed" if target not in left else f"up to {in_words(sizes[target])} to install"
        say(f"{target.folder} from {lock}: {done}")
    uv = _uv(root)
    if left:
        machine = host(root)
        refuse(machine, root, sum(sizes.values()))
        if not machine.driver:
            say(
                "note: this machine has no NVIDIA driver, without which nothing of this can run; Ctrl-C stops the installation"
            )
    for target in left:
        for words in steps(target, root, uv, sys.executable):
            say(f"+ {' '.join(words)}")
            if not dry_run:
                _run(words, say)
        if not dry_run:
            (target.folder / _MARK).write_text(_state(target))
    _, served = wanted
    say(f"\n{'Afterwards' if dry_run and left else 'Now'}, check a job and run it:")
    say(f"  export {Environment.variable('engine_python')}={served.folder}/bin/python")
    say(f"  {wanted[0].folder}/bin/egm doctor -f job.yaml")
    say(f"  {wanted[0].folder}/bin/egm run -f job.yaml --view")
