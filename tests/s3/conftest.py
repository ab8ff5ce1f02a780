"""The misbehaving server and the small evaluation set of tests/unit/evaluate, here too."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "evaluation_fixtures", Path(__file__).parents[1] / "unit/evaluate/conftest.py"
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
server, dataset = _module.server, _module.dataset


def pytest_collection_modifyitems(items):
    """Whole commands and a server that starts again: seconds each, but minutes on a machine that others use too."""
    for item in items:
        if "s3" in Path(str(item.fspath)).parts:
            item.add_marker(pytest.mark.timeout(600))
