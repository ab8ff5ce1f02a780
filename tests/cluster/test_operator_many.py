"""Two hundred jobs at once, more than the GPUs can run: each runs once and ends correctly."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.operator_kit import Api, Drive, Operator, eval_job, kubeconfig, new_namespace, train_job, until

JOBS, FAIL_EVERY = 200, 10
ENDS = ("Succeeded", "Failed")


def _made(drive: Drive, number: int) -> str:
    """Create one job; every tenth fails permanently, every fifth is an evaluation."""
    name, code = f"j{number}", str(int(number % FAIL_EVERY == 0))
    wishes = {"egm.test/exit-code": code, "egm.test/delay": "1s"}
    if number % 5 == 1:
        # the servers run until they are deleted; the preparing pod and the client end by themselves
        wishes = {f"egm.test/{role}-exit-code": "0" for role in ("prepare", "evaluate")}
        kind = "gej"
        job = eval_job(name, 1, maxAttempts=1, podTemplate={"metadata": {"annotations": wishes}})
    else:
        kind, job = "gtj", train_job(name, wishes, output="s3://bucket/out", maxAttempts=2)
    drive.api.request("POST", drive.api.path(kind, drive.namespace), job)
    return kind


@pytest.mark.timeout(600)
def test_two_hundred_jobs_at_once(tmp_path: Path) -> None:
    api = Api(kubeconfig())
    with new_namespace(api, "many") as namespace:
        drive = Drive(api, namespace)
        operator = Operator(
            namespace, tmp_path / "log", EGM_OPERATOR_LEADER_ELECT="false", EGM_OPERATOR_BACKOFF_BASE_SECONDS="1"
        ).start()
        with ThreadPoolExecutor(8) as pool:
            kinds = Counter(pool.map(lambda i: _made(drive, i), range(JOBS)))

        def all_ended() -> bool:
            return all(
                (j.get("status") or {}).get("phase") in ENDS for k in ("gtj", "gej") for j in api.list(k, namespace)
            )

        until("all to end", all_ended, 480)
        found = {j["metadata"]["name"]: j["status"] for k in ("gtj", "gej") for j in api.list(k, namespace)}
        failed = {n for n, status in found.items() if status["phase"] == "Failed"}
        assert failed == {f"j{i}" for i in range(0, JOBS, FAIL_EVERY)}
        assert all(status["attempt"] == 1 + (name in failed) for name, status in found.items())
        until(
            "no server to be left",
            lambda: not [p for p in api.list("pod", namespace) if "-server-" in p["metadata"]["name"]],
        )
        assert operator.stop() == 0
        lines = operator.lines()
        made = Counter(line["message"].split()[1] for line in lines if line["message"].startswith("created "))
        assert made["PyTorchJob"] == kinds["gtj"] + len(failed) == 180 and made["Pod"] == kinds["gej"] == 40, made
        assert made["Job"] == 2 * kinds["gej"], made
        assert not [line for line in lines if line["level"] == "error" or "exception" in line]
