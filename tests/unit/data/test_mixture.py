"""Weights of data sets: the seed decides how often each row is used, and the numbers are known in advance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from grounding.data.mixture import taken, times


@given(rows=st.integers(0, 500), weight=st.floats(0.001, 20), seed=st.integers(0, 2**31))
def test_the_number_is_known_before_and_every_row_is_taken_about_as_often(rows: int, weight: float, seed: int) -> None:
    found = times(rows, weight, seed)
    assert len(found) == rows and found.sum() == taken(rows, weight)
    assert rows == 0 or found.max() - found.min() <= 1
    assert (found == times(rows, weight, seed)).all()


def test_another_seed_takes_other_rows() -> None:
    assert times(4, 2.5, 1).sum() == 10 and times(10, 1.0, 1).tolist() == [1] * 10
    assert times(100, 0.25, 1).sum() == 25 and times(100, 0.25, 1).tolist() != times(100, 0.25, 2).tolist()
