"""The demo is killed with `kill -9` at random moments and started again, and ends with the same table as an undisturbed
demo.

It takes half an hour of two cores: `pytest -s tests/demo`. `EGM_DEMO_KILLS` is the number of kills (6).
`EGM_DEMO_REFERENCE` names a finished run folder (`runs/demo`) of this checkout, which saves the undisturbed run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tables import curve, table

REPOSITORY = Path(__file__).parents[2]
KILLS = int(os.environ.get("EGM_DEMO_KILLS", "6"))


def start(runs, log):
    command = [sys.executable, "-m", "grounding.cli", "run", "-f", "jobs/demo.yaml", "--runs", str(runs)]
    with log.open("ab") as sink:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=sink, stderr=sink, start_new_session=True)


@pytest.mark.timeout(7200)
def test_a_demo_killed_at_random_moments_ends_in_the_same_table(tmp_path):
    log = tmp_path / "log"
    given = os.environ.get("EGM_DEMO_REFERENCE")
    reference = Path(given) if given else tmp_path / "reference/demo"
    if not given:
        assert start(tmp_path / "reference", log).wait() == 0, log.read_text()[-3000:]
    seed = int(os.environ.get("EGM_DEMO_SEED", random.randrange(1000)))
    print(f"EGM_DEMO_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(KILLS):
        child = start(tmp_path / "runs", log)
        try:
            code = child.wait(chance.uniform(5, 150))
            assert code == 0, log.read_text()[-3000:]
            break  # the run ended before the next kill
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            time.sleep(chance.uniform(0, 3))  # a short pause, so that supervisors may still be stopping processes
    assert start(tmp_path / "runs", log).wait() == 0, log.read_text()[-3000:]
    killed, undisturbed = (
        lambda name, run=run: (run / name).read_text() for run in (tmp_path / "runs/demo", reference)
    )
    assert table(killed) == table(undisturbed)
    assert curve(killed) == curve(undisturbed)
