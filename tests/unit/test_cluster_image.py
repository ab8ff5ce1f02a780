"""The image of a checkout for the real node of the test cluster (hack/cluster/image.py)."""

from __future__ import annotations

import importlib.util
import json
import posixpath
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_image", ROOT / "hack" / "cluster" / "image.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _checkout(folder: Path) -> Path:
    """Return a checkout with a virtual environment, whose Python is reached by a link to another folder of that Python."""
    python = _write(folder / "pythons" / "3.11.7" / "bin" / "python3.11")
    python.with_name("python3").symlink_to("python3.11")
    _write(folder / "pythons" / "3.11.7" / "lib" / "python3.11" / "os.py")
    _write(folder / "pythons" / "3.11.7" / "lib" / "python3.11" / "site-packages" / "other.py")
    (folder / "pythons" / "3.11").symlink_to("3.11.7")
    root, venv = folder / "checkout", folder / "checkout" / ".venv"
    _write(venv / "bin" / "egm", f"#!{venv}/bin/python\n")
    (venv / "bin" / "python").symlink_to(folder / "pythons" / "3.11" / "bin" / "python3")
    _write(venv / "pyvenv.cfg", f"home = {folder}/pythons/3.11/bin\n")
    _write(venv / "lib" / "python3.11" / "site-packages" / "egm.pth", f"{root}\n{root}/operator\n")
    _write(root / "grounding" / "__init__.py")
    _write(root / "operator" / "egm_operator" / "__init__.py")
    return root


def test_nothing_in_the_image_depends_on_the_place_of_checkout_and_python(image: ModuleType, tmp_path: Path) -> None:
    """Pods mount a volume over /tmp, where both may be on the machine that writes the image."""
    root, target = _checkout(tmp_path), tmp_path / "image.tar"
    image.environment(root, target, ["localhost/egm:dev"], _write(tmp_path / "busybox"), ["sh"])
    with tarfile.open(target) as outer:
        [manifest] = json.load(outer.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(outer.extractfile(manifest["Config"]))  # type: ignore[arg-type]
        with tarfile.open(fileobj=outer.extractfile(manifest["Layers"][0])) as layer:
            entries = {f"/{entry.name}": entry for entry in layer.getmembers()}
            files = {n: layer.extractfile(e).read().decode() for n, e in entries.items() if e.isfile()}  # type: ignore[union-attr]
    links = {name: entry.linkname for name, entry in entries.items() if entry.issym()}
    assert not any(str(tmp_path) in text for text in (*entries, *links.values(), *files.values()))
    for name, to in links.items():
        assert posixpath.normpath(posixpath.join(posixpath.dirname(name), to)) in entries, f"{name} -> {to}"
    assert links["/opt/egm/.venv/bin/python"] == "/opt/python/bin/python3.11"
    assert files["/opt/egm/.venv/pyvenv.cfg"] == "home = /opt/python/bin\n"
    assert files["/opt/egm/.venv/lib/python3.11/site-packages/egm.pth"].split() == ["/opt/egm", "/opt/egm/operator"]
    assert "PATH=/opt/egm/.venv/bin:/usr/local/bin:/usr/bin:/bin" in config["config"]["Env"]
    assert {"/opt/python/lib/python3.11/os.py", "/opt/egm/grounding/__init__.py"} <= files.keys()
    assert not any("other.py" in name for name in files)
