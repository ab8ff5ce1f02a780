"""Find the packages installed in an environment, and the CUDA for which its torch was built, without importing them.

Other interpreters also run the text of this file, so it only uses the standard library of Python 3.9 and later.
"""

import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List  # noqa: UP035


def look(names: List[str]) -> Dict[str, Any]:  # noqa: UP006
    """Return {"packages": name -> version, "cuda": text or ""}."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    cuda = ""
    spec = importlib.util.find_spec("torch")  # for a top-level package, this imports nothing
    if spec is not None and spec.origin:
        version = Path(spec.origin).with_name("version.py")
        text = version.read_text(encoding="utf-8") if version.is_file() else ""
        built = re.search(r"^cuda\s*(?::[^=]+)?=\s*'([0-9.]+)'", text, re.MULTILINE)
        cuda = built.group(1) if built else ""
    return {"packages": found, "cuda": cuda}


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1:])))  # noqa: T201 - read by the process that started this one
