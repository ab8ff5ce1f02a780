"""The images' lock files: `make locks` compiles each `requirements.in` (and the project's extras) to exact versions with hashes.

A lock is resolved for the oldest Python that the project supports, and is also valid for the newer ones (`check` resolves for those too).
CPU images and the operator have the versions of uv.lock, with which every test runs. GPU images have versions of their own, because the
engines' pins exclude some of those.

    locks.py refresh [NAME ...] [--upgrade]     write the locks; without --upgrade, a version is kept if it still fits
    locks.py check   [NAME ...] [--offline]     resolve again and print what would change; exit code 1 if anything would
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "images"
PYTHONS = ("3.11", "3.12")  # locks are resolved for the first one and checked for the others
SOURCES = (
    "antlr4-python3-runtime",
)  # pure Python that is published only as source; built by the setuptools of images/build


@dataclass(frozen=True)
class Lock:
    """One lock file: `images/<folder>/requirements[-cpu].txt`.

    `extras` of pyproject.toml count as requirements. `tested`: versions are uv.lock's. `glibc` is the oldest C library that a wheel may
    require. `entries`: the modules that the image's programs import first; if each can be imported, no package is missing.
    """

    folder: str
    extras: tuple[str, ...] = ()
    project: bool = True
    cpu: bool = False
    tested: bool = False
    glibc: str = "2_28"
    entries: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the lock's name on the command line."""
        return f"{self.folder}-cpu" if self.cpu else self.folder

    @property
    def path(self) -> Path:
        """Return the path of the lock file."""
        return FOLDER / self.folder / ("requirements-cpu.txt" if self.cpu else "requirements.txt")

    @property
    def inputs(self) -> list[str]:
        """Return the paths of its requirement files, relative to the project's root."""
        own = FOLDER / self.folder / "requirements.in"
        use_own = own.exists() and not self.cpu
        return [*(["pyproject.toml"] if self.project else []), *([str(own.relative_to(ROOT))] if use_own else [])]


_VLLM = ("vllm.entrypoints.openai.api_server",)
_TRAIN = (
    *("grounding.data.jobdata", "grounding.train.sft.run", "grounding.train.rl.run", "grounding.train.rl.ray_cluster"),
    *("grounding.train.rl.reward", "verl.trainer.main_ppo", "verl.model_merger", "torch.distributed.run", "ray"),
)
_INFER = ("grounding.evaluate.role", "grounding.evaluate.run", "grounding.runtime.startup", "torchvision")
_OPERATOR = ("egm_operator.controller.main", "egm_operator.render", "grounding.api", "grounding.roles")
_TRANSFORMERS = ("transformers.cli.serve", "uvicorn", "openai")
LOCKS = (
    Lock("build", project=False),
    Lock("operator", project=False, tested=True, entries=_OPERATOR),
    Lock("train", extras=("train", "rl", "gpu"), glibc="2_34", entries=(*_TRAIN, *_VLLM)),
    Lock("train", extras=("train", "rl"), cpu=True, tested=True, entries=_TRAIN),
    Lock("infer-sglang", glibc="2_34", entries=(*_INFER, "sglang.launch_server", "sglang.srt.entrypoints.http_server")),
    Lock("infer-vllm", glibc="2_34", entries=(*_INFER, *_VLLM)),
    Lock("infer-transformers", extras=("serve",), cpu=True, tested=True, entries=(*_INFER, *_TRANSFORMERS)),
)


def _uv() -> str:
    found = os.environ.get("UV") or shutil.which("uv")
    if not found:
        raise SystemExit("error: uv is not installed here; run this by `make locks`")
    return found


def tested_versions() -> str:
    """Return all versions of uv.lock as constraints, without hashes."""
    words = [
        _uv(),
        "export",
        "--frozen",
        "--all-extras",
        "--no-emit-project",
        "--no-hashes",
        "--no-annotate",
        "--no-header",
        "--quiet",
    ]
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def command(
    lock: Lock, target: Path, *, python: str, constraints: Path | None, upgrade: bool, offline: bool
) -> list[str]:
    """Return the command that resolves `lock` into `target`. Versions that `target` already has are kept if they fit."""
    words = [_uv(), "pip", "compile", *lock.inputs, "--output-file", str(target), "--quiet"]
    words += ["--python-version", python, "--python-platform", f"x86_64-manylinux_{lock.glibc}"]
    words += ["--generate-hashes", "--no-emit-index-url", "--custom-compile-command", "make locks"]
    words += ["--only-binary", ":all:", *(w for name in SOURCES for w in ("--no-binary", name))]
    for extra in lock.extras:
        words += ["--extra", extra]
    for kind in ("overrides", "excludes"):
        if (file := FOLDER / lock.folder / f"{kind}.txt").exists():
            words += [f"--{kind}", str(file.relative_to(ROOT))]
    if not lock.cpu:
        words.append("--no-config")  # pyproject.toml leaves out what only GPU kernels load
    if constraints:
        words += ["--constraints", str(constraints), "--no-annotate"]  # annotations would name the constraints' file
    return words + (["--upgrade"] if upgrade else []) + (["--offline"] if offline else [])


def versions(text: str) -> dict[str, str]:
    """Return name -> version of every line of a lock."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", text, re.MULTILINE))


def resolve(
    lock: Lock, target: Path, *, python: str = PYTHONS[0], only: str = "", upgrade: bool = False, offline: bool = False
) -> None:
    """Resolve into `target`, within the constraints `only`. Raises `subprocess.CalledProcessError` with uv's message in `stderr`."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = None
        if only or lock.tested:
            constraints = Path(folder) / "only.txt"
            constraints.write_text(only or tested_versions())
        words = command(lock, target, python=python, constraints=constraints, upgrade=upgrade, offline=offline)
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)


def difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return what would change, with one line for each package."""
    return [
        f"{n}: {old.get(n, 'absent')} -> {new.get(n, 'absent')}"
        for n in sorted(old.keys() | new.keys())
        if old.get(n) != new.get(n)
    ]


def check(lock: Lock, *, offline: bool = False) -> list[str]:
    """Resolve again for each Python, and return what would change."""
    found = []
    old = lock.path.read_text()
    for python in PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "requirements.txt"
            target.write_text(old)
            # a newer Python might get newer versions; the check is whether these versions also fit
            only = "" if python == PYTHONS[0] else "".join(f"{n}=={v}\n" for n, v in versions(old).items())
            resolve(lock, target, python=python, only=only, offline=offline)
            new = target.read_text()
        changes = difference(versions(old), versions(new))
        found += [f"{lock.name}, Python {python}: {c}" for c in changes]
        if python == PYTHONS[0] and new != old and not changes:
            found.append(f"{lock.name}: hashes or notes differ")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = argparse.ArgumentParser(description="The images' lock files.")
    parser.add_argument("what", choices=("refresh", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(x.name for x in LOCKS))
    parser.add_argument("--upgrade", action="store_true")
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - {x.name for x in LOCKS}:
        parser.error(f"no such lock: {', '.join(sorted(unknown))}; there are {', '.join(x.name for x in LOCKS)}")
    code = 0
    for lock in LOCKS:
        if args.names and lock.name not in args.names:
            continue
        try:
            if args.what == "refresh":
                resolve(lock, lock.path, upgrade=args.upgrade, offline=args.offline)
                sys.stdout.write(f"{lock.path.relative_to(ROOT)}: {len(versions(lock.path.read_text()))} packages\n")
            elif changes := check(lock, offline=args.offline):
                code = 1
                sys.stdout.write("".join(f"{c}\n" for c in changes))
        except subprocess.CalledProcessError as e:
            code = 1
            sys.stderr.write(f"error: {lock.name}: {e.stderr.strip()}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
