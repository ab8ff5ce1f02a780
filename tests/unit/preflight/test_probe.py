"""Reading the state of this machine: nvidia-smi's lines, other interpreters, ports, disks, a hub on loopback."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub import Hub
from model_folders import write_model

from grounding.preflight import packages, probe
from grounding.preflight.facts import Gpu, Memory
from grounding.preflight.needs import Needs, Source

SMI = """\
0, NVIDIA H200, 143771, 4, 580.159.04
1, NVIDIA H200, 143771, 70000, 580.159.04
2, NVIDIA A100, [N/A], [Insufficient Permissions], 580.159.04
No devices were found
"""


def test_lines_of_nvidia_smi() -> None:
    devices, driver = probe.parse_devices(SMI)
    assert driver == "580.159.04" and len(devices) == 3
    assert devices[1] == Gpu(1, "NVIDIA H200", 143771 << 20, 70000 << 20)
    assert (devices[2].memory, devices[2].used) == (0, 0)
    assert probe.parse_devices("") == ((), "")


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program called nvidia-smi first on PATH."""
    file = tmp_path / "bin" / "nvidia-smi"
    file.parent.mkdir()
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    return file


def test_an_nvidia_smi_that_fails_is_quoted(smi: Path) -> None:
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    smi.chmod(0o755)
    assert probe.gpus().problem == "Failed to initialize NVML: Driver/library version mismatch"


def test_the_driver_and_what_may_be_used(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text(f"#!/bin/sh\ncat <<'E'\n{SMI}E\n")
    smi.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = probe.gpus()
    assert (found.driver, found.visible, found.problem, len(found.devices)) == ("580.159.04", ("1",), "", 3)


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       8000 kB\nMemFree:        1000 kB\nMemAvailable:   6000 kB\n")
    assert probe.memory(info, tmp_path) == Memory(8000 * 1024, 6000 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("2048\n")
    assert probe.memory(info, tmp_path) == Memory(8000 * 1024, 6000 * 1024)
    (tmp_path / "memory.max").write_text("4096\n")
    assert probe.memory(info, tmp_path) == Memory(4096, 2048)
    assert probe.memory().total > 0


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path: Path) -> None:
    found = probe.disk("runs", tmp_path / "a" / "b")
    assert found.free > 0 and found.writable and not (tmp_path / "a").exists()


def test_a_port_in_use() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert "already in use" in probe.port(s.getsockname()[1]).problem


def test_another_interpreter_is_asked_and_imports_nothing(tmp_path: Path) -> None:
    twin = tmp_path / "python"
    twin.symlink_to(sys.executable)  # another path, so that it is queried as a process
    found = probe.interpreter(twin, ["pydantic", "no-such-package"])
    own = probe.interpreter(Path(sys.executable), ["pydantic", "no-such-package"])
    assert found.problem == "" and list(own.packages) == ["pydantic"]
    assert probe.interpreter(tmp_path / "gone", []).problem
    (tmp_path / "bad").write_text("#!/bin/sh\necho 'bad interpreter' >&2; exit 3\n")
    (tmp_path / "bad").chmod(0o755)
    assert probe.interpreter(tmp_path / "bad", []).problem == "bad interpreter"


def test_which_cuda_torch_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise SystemExit('imported')\n")
    (torch / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert packages.look([])["cuda"] == "12.8"
    (torch / "version.py").write_text("cuda = None\n")
    assert packages.look([])["cuda"] == ""


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "coco.tar.part_a").touch()
    model = tmp_path / "model"
    model.mkdir()
    wanted = [
        Source(str(tmp_path / "coco.tar"), "spec.data.images[0]"),  # exists in parts
        Source(str(tmp_path / "rows.jsonl"), "spec.data.files[0]"),
        Source(str(model), "spec.model.source", True),
        Source("owner/name", "spec.model.source", True),  # the engine resolves this name
        Source("s3://bucket/x", "spec.data.files[1]"),
    ]
    gone = probe.absent(wanted)
    assert [(g.path.name, g.field) for g in gone] == [("rows.jsonl", "spec.data.files[0]")]
    model.rmdir()
    assert [g.field for g in probe.absent(wanted)] == ["spec.data.files[0]", "spec.model.source"]


def test_a_model_folder_that_is_not_whole_and_one_of_another_family(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m")
    wanted = Needs(
        "j", sources=(Source(str(whole), "spec.model.source", True), Source(str(tmp_path), "spec.data.images[0]"))
    )
    assert probe.broken([wanted]) == ()
    [other] = probe.broken([replace(wanted, family="internvl")])
    assert other.folder == whole and other.problem.startswith("config.json: ") and other.cure
    (whole / "preprocessor_config.json").unlink()
    [found] = probe.broken([wanted])
    assert "preprocessor_config.json: is absent" in found.problem and found.cure


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    import huggingface_hub.constants

    found = Hub({"owner/model": {"config.json": b"{}", "weights.bin": b"w" * 20_000}})
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield found
    found.stop()


def asked(*uris: str) -> list[tuple[str, int, str, bool]]:
    needs = Needs("j", sources=tuple(Source(u, f"spec.data.files[{i}]") for i, u in enumerate(uris)))
    return [(r.uri, r.missing, r.problem, r.cached) for r in probe.network([needs]).remotes]


def test_what_a_hub_would_send_is_known_and_nothing_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from grounding.storage import fetch

    pytest.importorskip("huggingface_hub")
    assert asked("hf://owner/model") == [("hf://owner/model", 20_002, "", False)]
    assert hub.asked == []  # nothing was downloaded
    [(_, _, problem, _)] = asked("hf://owner/other")
    assert "no such repository" in problem
    assert probe.hub().problem == ""
    fetch("hf://owner/model")
    assert asked("hf://owner/model") == [("hf://owner/model", 0, "", True)]
    hub.down = True
    monkeypatch.setattr(probe, "PATIENCE_S", 0.5)
    [(_, _, problem, cached)] = asked("hf://owner/model")
    assert problem and cached
    hub.stop()
    assert "cannot be reached" in probe.hub().problem
    hub.start()


def test_a_store_that_never_answers_costs_its_patience_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    from grounding.preflight.facts import Remote

    monkeypatch.setattr(probe, "PATIENCE_S", 0.0)
    release = threading.Event()
    began = time.monotonic()
    found = probe._each([
        (Remote("hf://a/b", "f"), lambda: (release.wait(20), Remote("never"))[1]),
        (Remote("s3://c", "g"), lambda: Remote("s3://c", "g", 5)),
    ])  # fmt: skip
    release.set()
    assert time.monotonic() - began < 10
    assert found[0].problem.startswith("no answer within") and not found[0].mistake and found[0].uri == "hf://a/b"
    assert found[1] == Remote("s3://c", "g", 5)


def test_credentials_of_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert probe.s3().problem == "there are no credentials"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert probe.s3().problem == ""
