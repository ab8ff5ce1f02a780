"""The back ends that run the gangs in a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from egm_operator.manifests.gangs import BACKENDS

from tests.unit.operator import world


@pytest.fixture(scope="module", params=list(BACKENDS))
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set each back end in turn in the operator's settings, and return its name."""
    before = world.SETTINGS
    world.SETTINGS = before.model_copy(update={"backend": request.param})
    yield str(request.param)
    world.SETTINGS = before
