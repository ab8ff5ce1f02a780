"""The misbehaving server and the small evaluation set of tests/unit/evaluate, here too."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "evaluation_fixtures", Path(__file__).parents[1] / "unit/evaluate/conftest.py"
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
server, dataset = _module.server, _module.dataset
