"""The end of a training whose pods share no folder."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from grounding.errors import Failure
from grounding.runtime.grace import Stop
from grounding.train.checkpoints.own_disks import OwnDisks, no_rank_of
from grounding.train.rl import run as rl


class _Uploader(SimpleNamespace):
    """An uploader that finishes or fails as the test says, and records for how long it was asked to wait."""

    def settle(self, patience_s: float, given_up: Callable[[], object]) -> bool:
        self.patience_s = patience_s
        return bool(self.settles) and not given_up()


def _settle(code: int, *, settles: bool = True, lost: str = "", problem: str = "") -> float:
    uploader = _Uploader(settles=settles, problem=problem)
    disks = OwnDisks("s3://b/j", no_rank_of, uploader=uploader)  # type: ignore[arg-type]
    assert rl._settle(disks, code, Stop(50.0), lambda: lost) == code
    return float(uploader.patience_s)


def test_a_finished_run_waits_long_and_a_failed_one_within_its_grace_period() -> None:
    assert _settle(0) == 3600.0
    assert _settle(1) == _settle(143, settles=False) == _settle(1, lost="worker 1 has left") == 40.0


def test_a_finished_run_that_is_stopped_while_it_waits_for_other_pods_was_stopped() -> None:
    now = [0.0]
    stop = Stop(50.0, lambda: now[0])
    stop.ask()
    disks = OwnDisks("s3://b/j", no_rank_of, uploader=_Uploader(settles=True, problem=""))  # type: ignore[arg-type]
    assert rl._settle(disks, 0, stop, lambda: "") == 0, "there was time for the files"
    now[0] = 41.0
    assert rl._settle(disks, 0, stop, lambda: "") == 143


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"lost": "worker 1 (b) has left: it was asked to stop", "problem": "unused"}, r"worker 1 \(b\) has left"),
        ({"settles": False, "problem": "checkpoint global_step_4 cannot be uploaded"}, "step_4 cannot be uploaded"),
        ({"settles": False}, "files of other pods are missing"),
    ],
)
def test_a_finished_run_without_the_files_of_all_pods_has_failed(more: dict, why: str) -> None:
    with pytest.raises(Failure, match=f"not complete in s3://b/j: .*{why}"):
        _settle(0, **more)
