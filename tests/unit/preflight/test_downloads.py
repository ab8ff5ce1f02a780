"""`egm fetch`: sizes first, then the downloads, into the cache that the roles use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grounding.cli import run as egm
from grounding.errors import Failure, UserError
from grounding.preflight import downloads, probe
from grounding.storage import Outstanding

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: look}
spec: {engine: sglang, model: {source: hf://owner/model}, data: {images: [hf://datasets/owner/set/coco.tar], files: [FILE]}}
"""


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that reads a model of 7 MB, of which 2 MB are here, and pictures that are here."""
    sizes = {
        "hf://owner/model": Outstanding(7_000_000, 5_000_000),
        "hf://datasets/owner/set/coco.tar": Outstanding(9, 0),
    }

    def ask(uri: str, **_: object) -> Outstanding:
        if uri not in sizes:
            raise UserError("nothing is there", file=uri)
        return sizes[uri]

    monkeypatch.setattr(probe, "outstanding", ask)
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").touch()
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("FILE", str(tmp_path / "a.jsonl")))
    return file


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(downloads, "fetch", lambda uri, say: found.append(uri) or Path("/there"))
    return found


def test_a_dry_run_says_what_is_missing(manifest: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["fetch", "-f", str(manifest), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "hf://owner/model (spec.model.source): 5.0 MB to download\n" in said and "coco.tar" in said
    assert "complete" in said and "nothing was downloaded" in said and not fetched


def test_everything_is_downloaded_by_the_storage_of_the_roles(
    manifest: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert egm(["fetch", "-f", str(manifest)]) == 0
    assert set(fetched) == {"hf://owner/model", "hf://datasets/owner/set/coco.tar"}
    assert "hf://owner/model -> /there" in capsys.readouterr().out


def test_a_missing_source_is_named_before_any_download(
    manifest: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest.write_text(manifest.read_text().replace("owner/model", "owner/other"))
    assert egm(["fetch", "-f", str(manifest)]) == 2
    error = capsys.readouterr().err
    assert "hf://owner/other" in error and "Nothing was downloaded" in error and not fetched


def test_the_manifests_have_to_fit_on_the_disk_together(
    manifest: Path, fetched: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = manifest.with_name("other.yaml")
    other.write_text(manifest.read_text().replace("owner/model", "owner/second"))
    sizes = {"hf://owner/model": 5_000_000, "hf://owner/second": 4_000_000}
    monkeypatch.setattr(probe, "outstanding", lambda uri, **_: Outstanding(9_000_000, sizes.get(uri, 0)))
    disk, free = probe.disk, 8_999_999
    monkeypatch.setattr(probe, "disk", lambda what, path: replace(disk(what, path), free=free))
    files = ["-f", str(manifest), "-f", str(other)]
    assert egm(["fetch", *files]) == 2 and not fetched
    error = capsys.readouterr().err
    assert f"The downloads of {manifest}, {other}" in error and "9.0 MB" in error
    free += 1
    assert egm(["fetch", *files]) == 0 and sorted(fetched) == ["hf://datasets/owner/set/coco.tar", *sizes]


def test_a_source_that_cannot_be_checked_is_not_called_complete(
    manifest: Path, fetched: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(uri: str, **_: object) -> Outstanding:
        if uri == "hf://owner/model" and reached:
            return Outstanding(5, 5)
        raise Failure("the hub cannot be reached", file=uri)

    reached = False
    monkeypatch.setattr(probe, "outstanding", unreachable)
    monkeypatch.setattr(probe, "in_cache", lambda _: True)
    assert egm(["fetch", "-f", str(manifest)]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("could not be checked: ") == 2 and "the hub cannot be reached; the files downloaded before" in said
    )
    assert "All is there" not in said and "complete" not in said and not fetched
    reached = True
    assert egm(["fetch", "-f", str(manifest)]) == 0 and fetched == ["hf://owner/model"]


def test_jobs_without_remote_inputs_need_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).parents[3] / "jobs" / "demo.yaml"
    assert egm(["fetch", "-f", str(demo)]) == 0 and "nothing from the hub" in capsys.readouterr().out


def test_the_placeholder_of_an_output_does_not_matter(manifest: Path, fetched: list[str]) -> None:
    manifest.write_text(manifest.read_text().replace("spec: {", "spec: {output: s3://your-bucket/x, "))
    assert egm(["fetch", "-f", str(manifest), "--dry-run"]) == 0
