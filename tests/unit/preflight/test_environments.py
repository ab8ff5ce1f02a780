"""`egm setup gpu`: the commands, what it refuses before a download, and that a repeated call does nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grounding.cli import run as egm
from grounding.errors import EgmError
from grounding.preflight import environments

ROOT = Path(__file__).parents[3]
HOST = environments.Host("linux on x86_64", (2, 36), (3, 12), 10**11)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout with the locks, on a machine that they fit; its uv writes down the words of each call."""
    for lock in ("train", "infer-sglang", "infer-vllm", "build"):
        (tmp_path / "images" / lock).mkdir(parents=True)
        shutil.copy(ROOT / "images" / lock / "requirements.txt", tmp_path / "images" / lock)
    uv = tmp_path / ".cache/installer/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(
        f'#!/bin/sh\necho "$UV_PYTHON_DOWNLOADS $*" >> {tmp_path}/calls; echo "$UV_SYSTEM_CERTS" > {tmp_path}/certificates\n'
        'for last; do :; done; [ "$1" != venv ] || mkdir -p "$last"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setattr(environments, "checkout", lambda: tmp_path)
    monkeypatch.setattr(environments, "host", lambda _: HOST)
    return tmp_path


def _setup(engine: str = "sglang", *, dry_run: bool = False) -> list[str]:
    lines: list[str] = []
    environments.setup(engine, dry_run=dry_run, say=lines.append)
    return "\n".join(lines).splitlines()


def test_two_environments_are_installed_from_the_locks_once(machine: Path) -> None:
    said = _setup("vllm")
    calls = (machine / "calls").read_text().splitlines()
    assert [c.split()[1:3] for c in calls] == [
        ["venv", "--quiet"],
        *[["pip", "install"]] * 2,
        ["venv", "--quiet"],
        ["pip", "install"],
    ]
    assert all(c.startswith("never ") for c in calls) and all("--no-deps" in c for c in calls if " pip " in c)
    assert calls[1].endswith(f"-r {machine}/images/train/requirements.txt") and "--require-hashes" in calls[1]
    assert calls[2].endswith(f"--editable {machine}") and calls[4].endswith("images/infer-vllm/requirements.txt")
    assert f"  export EGM_ENGINE_PYTHON={machine}/.venv-vllm/bin/python" in said
    again = _setup("vllm")
    assert (machine / "calls").read_text().splitlines() == calls and "already installed" in again[0] + again[1]
    with (machine / "images/infer-vllm/requirements.txt").open("a") as lock:
        lock.write("# newer\n")
    _setup("vllm")
    assert len((machine / "calls").read_text().splitlines()) == len(calls) + 2


def test_a_dry_run_prints_the_commands_and_changes_nothing(machine: Path) -> None:
    before = sorted(machine.rglob("*"))
    said = _setup(dry_run=True)
    assert sum(line.startswith("+ ") for line in said) == 5 and any(line.startswith("Afterwards") for line in said)
    assert sorted(machine.rglob("*")) == before


def test_a_machine_without_a_driver_is_told_before_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(line.startswith("note: ") for line in _setup(dry_run=True))
    monkeypatch.setattr(environments, "host", lambda _: replace(HOST, driver=False))
    said = _setup(dry_run=True)
    assert said[2].startswith("note: this machine has no NVIDIA driver") and said[3].startswith("+ ")


def test_a_failed_installation_is_not_taken_for_a_complete_one(machine: Path) -> None:
    uv = machine / ".cache/installer/bin/uv"
    uv.write_text(uv.read_text().replace("[ ", '[ "$2" != install ] || exit 1; [ ', 1))
    with pytest.raises(EgmError, match="exit code 1") as caught:
        _setup()
    assert caught.value.exit_code == 1 and "same command continues" in caught.value.hint
    assert not environments.complete(environments.targets(machine, "sglang")[0])


def test_what_a_failed_installation_has_left_is_not_asked_of_the_disk_again(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = machine / ".venv-train/lib/torch.so"
    left.parent.mkdir(parents=True)
    with left.open("wb") as file:
        file.truncate(environments.SIZE - 10**9)
    (machine / ".venv-train/lib64").symlink_to("lib")
    monkeypatch.setattr(environments, "host", lambda _: replace(HOST, free=environments.SIZE + 10**9 - 1))
    with pytest.raises(EgmError, match=r"14\.0 GB are free, but the environments need up to 14\.0 GB"):
        _setup()
    monkeypatch.setattr(environments, "host", lambda _: replace(HOST, free=environments.SIZE + 10**9))
    assert "up to 1.0 GB" in _setup()[0] and environments.complete(environments.targets(machine, "sglang")[0])


@pytest.mark.parametrize(
    ("bundle", "given", "seen"), [(True, None, "true"), (True, "false", "false"), (False, None, ""), (False, "1", "1")]
)
def test_uv_trusts_the_certificates_of_the_system_unless_the_user_decides(
    bundle: bool, given: str | None, seen: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = machine / "bundle.pem"
    monkeypatch.setattr(environments, "CERTIFICATES", ("/nowhere", str(file)))
    monkeypatch.delenv("UV_SYSTEM_CERTS", raising=False)
    if bundle:
        file.touch()
    if given:
        monkeypatch.setenv("UV_SYSTEM_CERTS", given)
    _setup()
    assert (machine / "certificates").read_text() == f"{seen}\n"


def test_the_makefile_looks_for_the_same_certificates() -> None:
    assert f"$(wildcard {' '.join(environments.CERTIFICATES)})" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ({"system": "linux on aarch64"}, "Linux on x86-64; this machine is linux on aarch64"),
        ({"glibc": (2, 31)}, "glibc 2.34 or newer; this machine has 2.31"),
        ({"glibc": ()}, "this machine has none"),
        ({"python": (3, 13)}, "Python 3.11 and 3.12; this is 3.13"),
        ({"free": 10**10}, "10.0 GB are free"),
    ],
)
def test_a_machine_that_the_locks_do_not_fit_is_refused_first(
    fact: dict[str, Any], text: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "host", lambda _: replace(HOST, **fact))
    with pytest.raises(EgmError, match=text) as caught:
        _setup()
    assert caught.value.exit_code == 2 and not (machine / "calls").exists()


def test_an_unknown_engine_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["setup", "gpu", "--engine", "transformers"]) == 2
    assert "expected sglang or vllm, found transformers" in capsys.readouterr().err
