"""The operator's metrics are correct and bounded, end with their job, and have formats that parsers accept."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kube.cache import Key, Store
from egm_operator.metrics.exposition import OWN_METRICS, Exposition
from egm_operator.metrics.jobs import (
    COSTS,
    FILES,
    FLEET_METRICS,
    JOB_METRICS,
    SETTINGS,
    Facts,
    Row,
    facts,
    phase_since,
    pods_with_gpus,
    text,
)
from egm_operator.metrics.meters import Meters, resource
from egm_operator.snapshot import Report
from egm_operator.status import Phase, Reason, stamp
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from grounding.api.status import EvalCosts, TrainStatus
from tests.unit.operator.world import NOW, World, evaluation, train

COST_FIELDS = [field.alias for field in EvalCosts.model_fields.values()]
ACCURACY = {
    "macro": 0.913,
    "micro": 0.92,
    "ci95": [0.9, 0.93],
    "files": [{"name": "refcoco_val", "n": 400, "acc": 0.913, "meanIou": 0.85, "errors": 0, "unparsed": 2}],
}


def exposition(store: Store, limit: int = 100, leads: bool = True, queue: WorkQueue[Key] | None = None) -> Exposition:
    return Exposition(store, queue or WorkQueue(), Meters(), lambda: leads, lambda: True, limit)


def told(store: Store, **more: Any) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return the samples by name, parsed from the text."""
    one = exposition(store, **more)
    _, body = one.render(one.view())
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in plain(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    matching = [v for have, v in found.get(name, []) if labels.items() <= have.items()]
    assert len(matching) == 1, (name, labels, found.get(name))
    return matching[0]


def job(kind: str = "GroundingTrainJob", name: str = "j", **status: Any) -> dict[str, Any]:
    raw = train() if kind == "GroundingTrainJob" else evaluation()
    return {**raw, "metadata": {**raw["metadata"], "name": name, "uid": name}, "status": status}


def store_of(*jobs: dict[str, Any]) -> Store:
    store = Store()
    for one in jobs:
        store.put(one)
    return store


def test_a_training_from_creation_to_its_end() -> None:
    world = World(train())
    mine = {"namespace": "n", "job_name": "j"}
    assert value(told(world.store), "egm_job_status", **mine, phase="Pending", reason="") == 1
    # otherwise increase() would lose the first hours
    assert value(told(world.store), "egm_job_gpu_seconds_total", **mine) == 0
    for _ in range(8):
        world.reconcile()
        world.controllers()
        world.start()
        if world.alive("prepare"):
            world.end("prepare", 0)
    assert world.status["phase"] == "Running"
    world.now += 400
    body = {"step": 30, "totalSteps": 300, "etaSeconds": 90, "metrics": {"score": 0.7, "valAccuracy": 0.8}}
    body["metrics"] |= {"rolloutsFailed": 3.0, "valFailed": 1.0}  # type: ignore[operator]
    body["events"] = [{"reason": "UploadFailing", "step": 30, "message": "expired"}]
    body |= {"saved": {"step": 25, "time": world.now - 60}, "uploaded": {"step": 20, "time": world.now - 90}}
    world.report = Report(world.now, {**body, "checkpoint": {"step": 20, "uri": "s3://b/c"}, "time": world.now})
    world.reconcile()
    found = told(world.store)
    assert value(found, "egm_job_status", **mine, kind="GroundingTrainJob", phase="Running") == 1
    assert value(found, "egm_job_info", **mine, method="rl", preset="egm-8b-rl", queue="") == 1
    assert value(found, "egm_job_gpus", **mine) == 16
    assert value(found, "egm_job_gpu_seconds_total", **mine) == pytest.approx(16 * 400, abs=32)
    assert value(found, "egm_job_progress_ratio", **mine) == 0.1
    assert (value(found, "egm_job_steps_finished", **mine), value(found, "egm_job_steps_wanted", **mine)) == (30, 300)
    assert value(found, "egm_job_eta_seconds", **mine) == 90 and value(found, "egm_job_checkpoint_step", **mine) == 20
    assert (value(found, "egm_job_saved_step", **mine), value(found, "egm_job_uploaded_step", **mine)) == (25, 20)
    assert value(found, "egm_job_saved_timestamp_seconds", **mine) == pytest.approx(world.now - 60, abs=1)
    assert value(found, "egm_job_uploaded_timestamp_seconds", **mine) == pytest.approx(world.now - 90, abs=1)
    assert value(found, "egm_job_output_writable", **mine) == 0
    assert value(found, "egm_job_rollouts_failed", **mine) == 3
    assert value(found, "egm_job_validation_prompts_failed", **mine) == 1
    TrainStatus.model_validate(world.status)
    assert value(found, "egm_job_score", **mine) == 0.7 and value(found, "egm_job_validation_accuracy", **mine) == 0.8
    assert value(found, "egm_job_progress_available", **mine) == 1
    assert value(found, "egm_job_phase_timestamp_seconds", **mine) < world.now
    assert value(found, "egm_jobs", kind="GroundingTrainJob", namespace="n", phase="Running") == 1
    world.settle()
    found = told(world.store)
    assert value(found, "egm_job_status", **mine, phase="Succeeded", reason="Completed") == 1
    assert value(found, "egm_job_gpus", **mine) == 0 and "egm_job_eta_seconds" not in found
    assert value(found, "egm_job_completion_timestamp_seconds", **mine) >= NOW
    world.store.drop(world.job)
    assert not [n for n in told(world.store) if n.startswith("egm_job_")]


def test_an_evaluation_with_its_files() -> None:
    status = {"phase": "Running", "done": 40, "total": 400, "requestsPerSecond": 12.5, "etaSeconds": 29, "servers": 2}
    found = told(store_of(job("GroundingEvalJob", **status, readyServers=1, accuracy=ACCURACY)))
    assert value(found, "egm_job_info", engine="sglang", method="") == 1
    assert value(found, "egm_job_progress_ratio") == 0.1 and value(found, "egm_job_requests_per_second") == 12.5
    assert value(found, "egm_job_servers") == 2 and value(found, "egm_job_servers_ready") == 1
    assert value(found, "egm_job_accuracy", mean="macro") == 0.913
    assert value(found, "egm_job_accuracy_bound", bound="high") == 0.93
    file = {"file": "refcoco_val"}
    assert [value(found, f"egm_job_file_{m}", **file) for m in ("accuracy", "iou", "questions", "errors", "unparsed")] == [
        0.913, 0.85, 400, 0, 2,
    ]  # fmt: skip


def test_a_sweep_with_its_settings_and_what_a_question_costs() -> None:
    costs = {"generatedTokens": 57.0, "flops": 2e12, "latencySeconds": 1.5, "gpuSeconds": 0.25, "money": 0.001}
    setting = {"model": "small", "name": "think-0", "done": 3, "total": 10, "accuracy": 0.5, "costs": costs}
    found = told(store_of(job("GroundingEvalJob", phase="Running", settings=[setting])))
    own = {"model": "small", "setting": "think-0"}
    assert value(found, "egm_job_setting_questions_answered", **own) == 3
    assert value(found, "egm_job_setting_accuracy", **own) == 0.5
    assert value(found, "egm_job_question_gpu_seconds", **own) == 0.25
    assert value(found, "egm_job_question_flops", **own) == 2e12
    alone = told(store_of(job("GroundingEvalJob", phase="Running", costs=costs)))
    assert value(alone, "egm_job_question_money", model="", setting="") == 0.001


def test_gpus_are_those_that_nodes_have_given() -> None:
    pod = {"kind": "Pod", "metadata": {"labels": {"grounding.egm.dev/role": "rl"}}}
    taken = {**pod, "status": {"phase": "Pending", "startTime": stamp(NOW)}}
    over = {**pod, "status": {"phase": "Failed", "startTime": stamp(NOW)}}
    waiting = {**pod, "status": {"phase": "Pending"}}
    assert pods_with_gpus([taken, over, waiting, taken]) == {"rl": 2}
    assert facts(train(resources={"nodes": 2, "gpusPerNode": 4})).gpus == 4
    assert (
        facts(evaluation(gpusPerServer=2)).gpus == 2
        and facts(evaluation(engine="transformers", gpusPerServer=0)).gpus == 0
    )


def test_a_spec_that_cannot_be_read_is_counted_all_the_same() -> None:
    raw = job(phase="Failed", reason="InvalidSpec")
    raw["spec"] = {"preset": "no-such-preset"}
    assert facts(raw) == Facts()
    assert value(told(store_of(raw)), "egm_job_status", reason="InvalidSpec") == 1


@pytest.mark.parametrize("kind", ["GroundingTrainJob", "GroundingEvalJob"])
def test_series_are_bounded(kind: str) -> None:
    files = [{"name": f"f{i}", "n": 1, "acc": 0.5, "meanIou": 0.5, "errors": 0, "unparsed": 0} for i in range(256)]
    full = {
        "phase": "Running", "reason": "AllPodsRunning", "attempt": 1, "gpuSeconds": 1.0, "done": 1, "total": 2, "servers": 1,
        "readyServers": 1, "requestsPerSecond": 1.0, "etaSeconds": 1, "completionTime": stamp(NOW),
        "accuracy": {**ACCURACY, "files": files}, "metrics": {f"m{i}": 1.0 for i in range(100)} | {"score": 1.0},
        "progress": {"step": 1, "totalSteps": 2, "etaSeconds": 1, "time": stamp(NOW)}, "checkpoint": {"step": 1},
        "conditions": [{"type": name, "status": "True"} for name in ("ProgressAvailable", "OutputWritable")],
        "settings": [{"name": f"s{i}", "done": 1, "total": 2, "accuracy": 0.5, "costs": dict.fromkeys(COST_FIELDS, 1.0)}
                     for i in range(200)],
        "costs": dict.fromkeys(COST_FIELDS, 1.0),
    }  # fmt: skip
    found = told(store_of(job(kind, **full)))
    own = {n: s for n, s in found.items() if n.startswith("egm_job_")}
    assert sum(map(len, own.values())) <= 25 + len(COSTS) + 5 * FILES + (3 + len(COSTS)) * SETTINGS
    phases, reasons = {str(p) for p in Phase}, {str(r) for r in Reason} | {""}
    for labels, _ in [*found["egm_job_status"], *found["egm_jobs"]]:
        assert labels["phase"] in phases and labels["reason"] in reasons


def test_of_too_many_jobs_those_that_run_keep_their_series() -> None:
    ended = [job(name=f"old{i}", phase="Succeeded", completionTime=stamp(NOW + i)) for i in range(5)]
    found = told(store_of(*ended, job(name="runs", phase="Running")), limit=2)
    assert {labels["job_name"] for labels, _ in found["egm_job_status"]} == {"runs", "old4"}
    assert value(found, "egm_jobs_left_out") == 4 and value(found, "egm_jobs", phase="Succeeded") == 5


def test_a_training_and_its_evaluation_may_have_one_name() -> None:
    found = told(store_of(job(phase="Running"), job("GroundingEvalJob", phase="Pending")))
    for name, samples in found.items():
        seen = [tuple(sorted(labels.items())) for labels, _ in samples]
        assert len(seen) == len(set(seen)), name
    assert value(found, "egm_job_status", job_name="j", kind="GroundingEvalJob", phase="Pending") == 1


def test_who_does_not_lead_tells_nothing_of_jobs() -> None:
    found = told(store_of(job(phase="Running")), leads=False)
    assert not [n for n in found if n.startswith("egm_job")]
    assert value(found, "egm_operator_leader") == 0
    assert value(found, "egm_operator_cached_objects", kind="GroundingTrainJob") == 1


def _conditions(**found: tuple[str, float]) -> list[dict[str, Any]]:
    said = {"reason": "Said", "message": ""}
    return [{"type": t, "status": s, **said, "lastTransitionTime": stamp(NOW + at)} for t, (s, at) in found.items()]


@pytest.mark.parametrize(
    ("phase", "conditions", "since"),
    [
        ("", {}, 0),
        ("Pending", {"ModelReady": ("True", 5), "DataReady": ("True", 30), "ProgressAvailable": ("False", 99)}, 30),
        ("Preparing", {"ModelReady": ("True", 5), "DataReady": ("False", 7)}, 7),
        ("Running", {"Running": ("True", 50), "DataReady": ("True", 30), "Restarting": ("False", 60)}, 50),
        ("Restarting", {"Restarting": ("True", 70), "Running": ("False", 70)}, 70),
        ("Pending", {"Restarting": ("False", 80), "Running": ("False", 70)}, 80),
        ("Suspended", {"Suspended": ("True", 90)}, 90),
        ("Succeeded", {"Succeeded": ("True", 100), "Running": ("False", 100)}, 100),
        ("Running", {"Running": ("False", 44)}, 44),  # a pod has disappeared, and the condition already says so
    ],
)
def test_since_when_a_job_is_in_its_phase(phase: str, conditions: Any, since: float) -> None:
    raw = job(phase=phase, conditions=_conditions(**conditions))
    assert phase_since(raw) == NOW + since


def test_phases_failures_and_ends_are_counted_when_a_status_is_written() -> None:
    meters = Meters()
    running = job(phase="Running", conditions=_conditions(Running=("True", 0)))
    meters.status_written(running, {"phase": "Running"}, NOW + 10)  # progress
    meters.status_written(running, {"phase": "Restarting", "reason": "OutOfMemory"}, NOW + 700)
    meters.status_written(running, {"phase": "Failed", "reason": "AttemptsExhausted"}, NOW + 800)
    read = meters.registry.get_sample_value
    labels = {"kind": "GroundingTrainJob", "phase": "Running"}
    assert read("egm_job_phase_duration_seconds_count", labels) == 2
    assert read("egm_job_phase_duration_seconds_sum", labels) == 1500
    assert read("egm_job_attempts_failed_total", {"kind": "GroundingTrainJob", "reason": "OutOfMemory"}) == 1
    ended = {"kind": "GroundingTrainJob", "phase": "Failed", "reason": "AttemptsExhausted"}
    assert read("egm_jobs_finished_total", ended) == 1


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/api/v1/namespaces/team/pods/p:8090/proxy/progress", "pods/proxy"),
        ("/api/v1/namespaces/team/events", "events"),
        ("/api/v1/pods", "pods"),
        ("/apis/grounding.egm.dev/v1alpha1/namespaces/n/groundingtrainjobs/j/status", "groundingtrainjobs/status"),
        ("/apis/batch/v1/namespaces/n/jobs/j", "jobs"),
        ("/apis/kubeflow.org/v1/pytorchjobs?limit=500", "pytorchjobs"),
        ("/apis/coordination.k8s.io/v1/namespaces/n/leases/egm-operator", "leases"),
        ("/version", "other"),
    ],
)
def test_a_path_without_its_names(path: str, wanted: str) -> None:
    assert resource(path) == wanted


def test_requests_and_reconciles_are_counted_by_their_outcome() -> None:
    meters = Meters()
    for code in (200, 201, 409, 0):
        meters.asked("PATCH", "/apis/batch/v1/namespaces/n/jobs/j", code, 0.01)
    read = meters.registry.get_sample_value
    name = "egm_operator_api_request_duration_seconds_count"
    assert [read(name, {"method": "PATCH", "resource": "jobs", "code": c}) for c in ("2xx", "409", "0")] == [2, 1, 1]


async def test_the_queue_tells_how_long_a_key_has_waited() -> None:
    waits: list[float] = []
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(clock=lambda: now, waited=waits.append)
    queue.add("a")
    now = 2.5
    queue.add("a")
    await queue.get()
    queue.after("b", 60)
    queue.retry("c")
    assert waits == [2.5] and (queue.working, queue.delayed, queue.failing) == (1, 2, 1)


NASTY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["step", "totalSteps", "etaSeconds", "time"]), NASTY),
    NASTY,
    NASTY,
    st.text(max_size=8),
)
def test_whatever_a_status_holds_the_text_can_be_read(progress: Any, done: Any, total: Any, name: str) -> None:
    progress = {k: v for k, v in progress.items() if k != "time" or isinstance(v, str)}
    files = [{"name": name, "n": done, "acc": total}]
    jobs = [
        job(phase="Running", progress=progress, gpuSeconds=done),
        job("GroundingEvalJob", phase=name, done=done, total=total, accuracy={"files": files}),
    ]
    rows = [Row(raw, Facts(queue=name), {}) for raw in jobs]
    for read, wanted in ((plain, False), (open_metrics, True)):
        written = "".join(text(rows, 10, wanted)) + ("# EOF\n" if wanted else "")
        found = {s.name: s for f in read(written) for s in f.samples}
        assert found["egm_job_info"].labels["queue"] == name
        assert "egm_job_file_accuracy" not in found or found["egm_job_file_accuracy"].labels["file"] == name


@pytest.fixture
async def client() -> Any:
    world = World(train())
    world.settle()
    for i in range(60):
        world.store.put(job(name=f"j{i}", phase="Running"))
    app = web.Application()
    app.router.add_get("/metrics", exposition(world.store).handle)
    async with TestClient(TestServer(app), auto_decompress=False) as found:
        yield found


async def test_over_http_in_both_formats_compressed_when_wanted(client: Any) -> None:
    wanted = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;version=0.0.4;q=0.5"
    async with client.get("/metrics", headers={"Accept": wanted, "Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.headers["Content-Encoding"] == "gzip"
        body = gzip.decompress(await answer.read()).decode()
    families = {f.name: f for f in open_metrics(body)}
    assert body.endswith("# EOF\n") and families["egm_job_gpu_seconds"].type == "counter"
    assert len(families["egm_job_status"].samples) == 61 and not [n for n in families if n.endswith("_created")]
    async with client.get("/metrics", headers={"Accept-Encoding": "identity"}) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert len(list(plain((await answer.read()).decode()))) == len(families)


def _documented() -> Iterator[str]:
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    for line in text.splitlines():
        if line.startswith("| `egm_") and not line.startswith("| `egm_train_") and not line.startswith("| `egm_eval_"):
            yield line.split("`")[1]


def test_every_metric_is_documented_and_no_other() -> None:
    meters = Meters()
    meters.reconciled("GroundingTrainJob", "ok", 0.1)
    own = {
        f.name + ("_total" if f.type == "counter" else "")
        for f in meters.registry.collect()
        if f.name.startswith("egm_")
    }
    assert sorted(_documented()) == sorted({*own, *JOB_METRICS, *FLEET_METRICS, *OWN_METRICS})


def test_a_scrape_of_many_jobs_reads_no_spec_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "egm_operator.metrics.exposition.facts", lambda raw: read.append(raw["metadata"]["name"]) or Facts()
    )
    one = exposition(store_of(*(job(name=f"j{i}") for i in range(3))))
    one.render(one.view())
    one.render(one.view())
    assert sorted(read) == ["j0", "j1", "j2"]
    changed = job(name="j1")
    changed["metadata"] |= {"generation": 2, "resourceVersion": "9"}
    one.store.put(changed)
    one.render(one.view())
    assert sorted(read) == ["j0", "j1", "j1", "j2"]
