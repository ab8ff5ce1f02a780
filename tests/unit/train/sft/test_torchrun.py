"""The exit code of a node of ranks."""

from __future__ import annotations

import pytest

from grounding.runtime import exits
from grounding.train.sft.torchrun import exit_code


@pytest.mark.parametrize(
    ("ranks", "first", "code"),
    [
        ({0: 1, 1: -15}, 0, 1),
        ({0: 1, 1: 2}, 0, exits.MISTAKE),  # rank 0 ended because rank 1 had failed
        ({3: -9}, 3, 137),
        ({0: 143, 1: 143}, 1, exits.STOPPED),
    ],
)
def test_a_node_ends_as_its_ranks_did(ranks: dict[int, int], first: int, code: int) -> None:
    assert exit_code(ranks, first) == code
