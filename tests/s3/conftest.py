"""Make the faulty server and the small evaluation set of tests/unit/evaluate available here."""

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
    """Give these tests a longer time limit: they run whole commands and restart a server, which is slow on a busy machine."""
    for item in items:
        if "s3" in Path(str(item.fspath)).parts:
            item.add_marker(pytest.mark.timeout(600))
