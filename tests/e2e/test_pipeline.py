"""The demo's four jobs as pods with outputs in S3: undisturbed, and with a killed pod in each stage, a pause and a
drained node.
In both cases, the table equals that of `egm run`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import curve, table

from tests.cluster.conftest import Kubectl
from tests.cluster.operator_kit import until
from tests.e2e.kit import BUCKET, KEY, SECRET, Pipeline, demo, egm

Read = Callable[[str], str]
LONG = 3000 if os.environ.get("EGM_E2E_FULL") == "1" else 900


def _same(pipeline: Pipeline, here: Read) -> None:
    there = pipeline.reader()
    assert table(there) == table(here)
    assert curve(there) == curve(here)


def test_the_table_is_that_of_egm_run(pipeline: Pipeline, here: Read, s3: tuple[str, Any], tmp_path: Path) -> None:
    began = time.monotonic()
    pipeline.submit(demo(), tmp_path)
    servers = until(
        "two servers", lambda: found if len(found := pipeline.pods("demo-before", "server")) == 2 else None, LONG
    )
    assert len({p["metadata"]["name"] for p in servers}) == 2
    for name in ("gtj/demo-sft", "gej/demo-before", "gtj/demo-rl", "gej/demo-after"):
        status = pipeline.phase(name, "Succeeded", seconds=LONG)
        assert status["attempt"] == 1, status
        if name.startswith("gtj"):  # the last report of a training must equal its final state
            assert status["progress"]["step"] == status["checkpoint"]["step"] == status["progress"]["totalSteps"], (
                status
            )
    print(f"the pipeline took {time.monotonic() - began:.0f} s")
    _same(pipeline, here)

    namespace = pipeline.kubectl.namespace
    told = egm("report", "demo-after", "--cluster", "-n", namespace, KUBECONFIG=pipeline.kubectl.kubeconfig).stdout
    [row] = [line.split() for line in told.splitlines() if line.startswith("refcoco_val")]
    assert int(row[1]) == table(here)["demo-after"]["files"][0]["n"] and "macro" in told
    keys = _keys(s3[0]) | {"EGM_CACHE": str(tmp_path / "cache")}
    page = tmp_path / "report.html"
    egm("report", f"s3://{BUCKET}/runs/{namespace}/demo-after", "-o", str(page), **keys)
    assert "refcoco_val" in page.read_text() and page.stat().st_size > 20_000


def _keys(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _suspend(pipeline: Pipeline, job: str, suspend: bool) -> None:
    pipeline.kubectl("patch", job, "--type=merge", "-p", f'{{"spec": {{"suspend": {str(suspend).lower()}}}}}')


def test_disturbed_in_every_stage_it_ends_in_the_same_table(
    pipeline: Pipeline, release: Kubectl, here: Read, tmp_path: Path
) -> None:
    jobs = demo()
    jobs[2]["spec"]["suspend"] = True  # RL waits, because otherwise it would end before the first evaluation
    pipeline.submit(jobs, tmp_path)

    # SFT: the pod is killed; then the job is suspended and resumed
    pipeline.step("gtj/demo-sft", 20, LONG)
    pipeline.kill("demo-sft", "sft")
    until("a second attempt", lambda: pipeline.job("gtj/demo-sft").get("attempt") == 2, 120)
    pipeline.phase("gtj/demo-sft", "Running", seconds=120)
    pipeline.step("gtj/demo-sft", 60, LONG)
    _suspend(pipeline, "gtj/demo-sft", True)
    pipeline.phase("gtj/demo-sft", "Suspended", seconds=120)
    until("the deletion of its pod", lambda: pipeline.pods("demo-sft", "sft") == [])
    _suspend(pipeline, "gtj/demo-sft", False)
    assert pipeline.phase("gtj/demo-sft", "Succeeded", seconds=LONG)["attempt"] == 2

    # the evaluation before RL: client, server and operator are killed, and nothing may be recorded twice
    until("answers", lambda: pipeline.job("gej/demo-before").get("done"), LONG)
    pipeline.kill("demo-before", "evaluate")
    pipeline.kill("demo-before", "server", 1)
    release("delete", "pod", "-l", "app.kubernetes.io/name=egm", "--grace-period=0", "--force")
    pipeline.phase("gej/demo-before", "Succeeded", seconds=LONG)

    # RL was submitted suspended: the pod is killed; then the node is drained (with S3 and the operator) and comes back
    _suspend(pipeline, "gtj/demo-rl", False)
    pipeline.step("gtj/demo-rl", 1, LONG)
    pipeline.kill("demo-rl", "rl")
    until("a second attempt", lambda: pipeline.job("gtj/demo-rl").get("attempt") == 2, 120)
    pipeline.step("gtj/demo-rl", 8, LONG)
    _drained(pipeline.kubectl)
    status = pipeline.phase("gtj/demo-rl", "Succeeded", seconds=LONG)
    assert status["attempt"] == 3 and status["progress"]["step"] == status["checkpoint"]["step"] == 16
    pipeline.phase("gej/demo-after", "Succeeded", seconds=LONG)
    _same(pipeline, here)


def _drained(kubectl: Kubectl) -> None:
    """Drain the node, wait a moment, and let it accept pods again."""
    try:
        told = kubectl.run("drain", "node1", "--delete-emptydir-data", "--force", "--timeout=100s")
        assert told.returncode == 0, told.stdout + told.stderr
        print(told.stdout)
        left = kubectl.get("pods", "--all-namespaces", "--field-selector=spec.nodeName=node1")["items"]
        assert [p["metadata"]["name"] for p in left if p["status"].get("phase") == "Running"] == []
    finally:
        kubectl("uncordon", "node1")
