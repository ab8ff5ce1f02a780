"""Write a package `sgl_kernel` that has every name and fails when called, so that SGLang's server starts without CUDA kernels.

    python bench/engines/stub_kernels.py FOLDER      then add FOLDER to PYTHONPATH

SGLang 0.5.12 imports its kernels at the start on any device. On a CPU it calls none of them, because each has an implementation in plain
torch. All other code is the real server's. Use it only to test the protocol, not to measure speed.
"""

import sys
from pathlib import Path

PACKAGE = """\
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "{version}"
__path__ = []


class Missing:
    def __init__(self, name):
        self.name = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"no kernel {{self.name}} on this machine")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{{self.name}}.{{name}}")


def lookup(prefix):
    def get(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(prefix + name)

    return get


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__getattr__ = [], lookup(spec.name + ".")
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
__getattr__ = lookup("")
"""


def write(folder: Path, version: str = "0.4.2.post2") -> None:
    """Write the package, and the metadata from which SGLang reads its version."""
    (folder / "sgl_kernel").mkdir(parents=True, exist_ok=True)
    (folder / "sgl_kernel/__init__.py").write_text(PACKAGE.format(version=version))
    for name in ("sgl_kernel", "sglang_kernel"):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
