"""GroundingEvalJob on a real control plane: servers that start, end or never start; results; remaining objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import (
    Api,
    Drive,
    Operator,
    eval_job,
    fresh_name,
    kubeconfig,
    new_namespace,
    train_job,
    until,
)

SUMMARY = {
    "done": 400,
    "total": 400,
    "requestsPerSecond": 12.5,
    "report": "s3://bucket/eval/report/index.html",
    "accuracy": {
        "macro": 0.913,
        "micro": 0.92,
        "ci95": [0.9, 0.93],
        "files": [{"name": "refcoco_val", "n": 400, "acc": 0.913, "mean_iou": 0.85, "errors": 0, "unparsed": 2}],
    },
}


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    api = Api(kubeconfig())
    with new_namespace(api) as namespace:
        log: Path = tmp_path_factory.mktemp("operator") / "log"
        operator = Operator(namespace, log).start()
        yield Drive(api, namespace)
        assert operator.running(), log.read_text()[-3000:]
        assert operator.stop() == 0
        assert not [line for line in operator.lines() if line["level"] == "error" or "exception" in line]


@pytest.fixture
def name() -> str:
    return fresh_name("e")


def _create(drive: Drive, name: str, servers: int = 2, **spec: object) -> None:
    drive.api.create("gej", drive.namespace, eval_job(name, servers, **spec))
    drive.prepared(name, kind="eval")


def _end_client(drive: Drive, name: str, code: int = 0, attempt: int = 1) -> None:
    drive.end(
        name, "evaluate", code, attempt, kind="eval", message=json.dumps(SUMMARY) if code == 0 else "connection lost"
    )


def test_from_creation_to_the_accuracy(drive: Drive, name: str) -> None:
    _create(drive, name)
    servers = drive.running(name, "server", 2, kind="eval")
    assert all(s["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" for s in servers)
    client = drive.running(name, "evaluate", kind="eval")[0]
    env = {e["name"]: e.get("value") for e in client["spec"]["containers"][0]["env"]}
    urls = env["EGM_ENDPOINTS"].split(",")
    assert len(urls) == 2 and all(f".{name}-eval-servers.{drive.namespace}.svc:8000" in u for u in urls)
    assert drive.api.get("service", drive.namespace, f"{name}-eval-servers")["spec"]["clusterIP"] == "None"
    drive.phase(name, "Running", kind="gej")
    drive.annotate(
        client,
        progress=json.dumps({"done": 40, "total": 400, "requestsPerSecond": 10.0, "etaSeconds": 36, "time": 1.0}),
    )
    status = until("progress", lambda: s if (s := drive.status(name, "gej")).get("done") else None)
    assert status["columns"] == {"done": "40/400", "requestsPerSecond": "10.0", "eta": "36s"} | (
        {"gpuHours": status["columns"]["gpuHours"]} if "gpuHours" in status["columns"] else {}
    )
    _end_client(drive, name)
    status = drive.phase(name, "Succeeded", kind="gej")
    assert status["accuracy"]["macro"] == 0.913 and status["accuracy"]["files"][0]["meanIou"] == 0.85
    assert status["report"].endswith("index.html") and status["columns"]["accuracy"] == "0.913"
    until("the deletion of the servers", lambda: drive.pods(name, "server", kind="eval") == [])


def test_a_sweep_over_models_starts_servers_once_a_model_and_shows_each_setting(drive: Drive, name: str) -> None:
    models = ["hf://JamesZGQ/EGM-4B", "hf://JamesZGQ/EGM-8B"]
    job = eval_job(name, 1, sweep={"models": [{"source": m} for m in models], "thinkingBudgets": [0, 64]})
    del job["spec"]["model"]
    drive.api.create("gej", drive.namespace, job)
    drive.prepared(name, kind="eval")
    servers, rows = [], []
    for number, model in enumerate(models, 1):

        def pod(role: str, number: int = number) -> Any:
            found = drive.pods(name, role, kind="eval")
            mine = [p for p in found if p["metadata"]["labels"]["grounding.egm.dev/model"] == str(number)]
            return mine[0] if mine and mine[0]["status"].get("phase") == "Running" else None

        server = until(f"the server of model {number}", lambda: pod("server"))
        servers.append(server["metadata"]["name"])
        assert server["spec"]["containers"][0]["command"][-4] == "--model"
        assert server["spec"]["containers"][0]["command"][-3] == model
        client = until(f"the client of model {number}", lambda: pod("evaluate"))
        assert client["metadata"]["name"].startswith(f"{name}-eval-m{number}-client-1")
        costs = {"generatedTokens": 57.0, "gpuSeconds": 0.25}
        now = [{"model": model, "name": f"think-{n}", "done": 7, "total": 10, "costs": costs} for n in (0, 64)]
        body = {"done": 20 * (number - 1) + 14, "total": 40, "settings": now, "time": 1.0}
        drive.annotate(client, progress=json.dumps(body))
        shown = until(
            "the settings of this model",
            lambda: (
                s if len((s := drive.status(name, "gej")).get("settings") or []) == 2 * number else None  # noqa: B023
            ),
        )
        assert [s["done"] for s in shown["settings"][-2:]] == [7, 7] and shown["columns"]["done"].endswith("/40")
        assert shown["settings"][-1]["costs"] == costs and shown["attempt"] == 1
        rows += [{**s, "done": 10, "accuracy": 0.5 + 0.1 * number, "ci95": [0.4, 0.8]} for s in now]
        message = json.dumps({"done": 20 * number, "total": 40, "settings": rows})
        drive.annotate(client, exit_code="0", message=message)
    status = drive.phase(name, "Succeeded", kind="gej")
    assert status["measuredModels"] == 2 and status["done"] == 40 and status["attempt"] == 1
    assert [(s["model"], s["name"], s["done"], s["accuracy"]) for s in status["settings"]] == [
        (model, setting, 10, 0.5 + 0.1 * n) for n, model in enumerate(models, 1) for setting in ("think-0", "think-64")
    ]
    assert servers == [f"{name}-eval-m1-server-0", f"{name}-eval-m2-server-0"]
    until("the deletion of the servers", lambda: drive.pods(name, "server", kind="eval") == [])


def test_a_server_that_never_starts_is_not_waited_for(drive: Drive, name: str) -> None:
    _create(drive, name, 2)
    _, second = drive.running(name, "server", 2, kind="eval")
    drive.annotate(second, ready="false")
    drive.running(name, "evaluate", kind="eval")
    _end_client(drive, name)
    drive.phase(name, "Succeeded", kind="gej")


def test_the_client_waits_for_as_many_servers_as_wanted(drive: Drive, name: str) -> None:
    _create(drive, name, 2, minServers=2, podTemplate={"metadata": {"annotations": {"egm.test/ready": "false"}}})
    for pod in drive.running(name, "server", 2, kind="eval")[:1]:
        drive.annotate(pod, ready="true")
    status = until("one of two", lambda: s if "1 of 2" in (s := drive.status(name, "gej")).get("message", "") else None)
    assert status["reason"] == "ServersStarting" and drive.pods(name, "evaluate", kind="eval") == []
    for pod in drive.running(name, "server", 2, kind="eval"):
        drive.annotate(pod, ready="true")
    drive.running(name, "evaluate", kind="eval")


def test_a_server_that_goes_comes_back_under_its_name(drive: Drive, name: str) -> None:
    _create(drive, name)
    drive.running(name, "evaluate", kind="eval")
    lost = drive.running(name, "server", 2, kind="eval")[0]
    drive.annotate(lost, evict="true")

    def back() -> bool:
        found = drive.api.get("pod", drive.namespace, lost["metadata"]["name"])
        return bool(
            found and found["metadata"]["uid"] != lost["metadata"]["uid"] and found["status"].get("phase") == "Running"
        )

    until("the new server", back)
    assert drive.status(name, "gej")["attempt"] == 1  # the client has continued, so it is still attempt 1
    _end_client(drive, name)
    drive.phase(name, "Succeeded", kind="gej")


def test_a_client_that_fails_is_started_again_beside_the_same_servers(drive: Drive, name: str) -> None:
    _create(drive, name, 1, maxAttempts=2)
    server = drive.running(name, "server", kind="eval")[0]["metadata"]["uid"]
    _end_client(drive, name, code=1)
    drive.phase(name, "Restarting", kind="gej")
    drive.running(name, "evaluate", attempt=2, kind="eval")
    assert drive.running(name, "server", kind="eval")[0]["metadata"]["uid"] == server
    _end_client(drive, name, code=1, attempt=2)
    status = drive.phase(name, "Failed", kind="gej")
    assert status["reason"] == "AttemptsExhausted" and "connection lost" in status["message"]
    until("the deletion of the servers", lambda: drive.pods(name, "server", kind="eval") == [])


def test_suspended_it_gives_the_gpus_back(drive: Drive, name: str) -> None:
    _create(drive, name)
    drive.running(name, "evaluate", kind="eval")
    drive.api.patch("gej", drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended", kind="gej")
    assert drive.pods(name, "server", kind="eval") == [] and drive.pods(name, "evaluate", kind="eval") == []
    drive.api.patch("gej", drive.namespace, name, {"spec": {"suspend": False}})
    drive.running(name, "evaluate", attempt=1, kind="eval")
    _end_client(drive, name)
    assert drive.phase(name, "Succeeded", kind="gej")["attempt"] == 1


def test_servers_that_never_become_ready_end_the_job(tmp_path: Path) -> None:
    api = Api(kubeconfig())
    with new_namespace(api) as namespace:
        operator = Operator(namespace, tmp_path / "log", EGM_OPERATOR_SERVER_START_SECONDS="-1797").start()
        drive = Drive(api, namespace)
        _create(drive, "never", 1, podTemplate={"metadata": {"annotations": {"egm.test/ready": "false"}}})
        status = drive.phase("never", "Failed", kind="gej")
        assert status["reason"] == "ServersNotReady" and "0 of 1" in status["message"]
        until("the deletion of the servers", lambda: drive.pods("never", "server", kind="eval") == [])
        assert operator.stop() == 0


def test_endpoints_that_run_already_need_no_server(drive: Drive, name: str) -> None:
    job = eval_job(name, 1, endpoints=["http://here:1"])
    del job["spec"]["gpusPerServer"]  # only for servers that the job starts
    drive.api.create("gej", drive.namespace, job)
    drive.prepared(name, kind="eval")
    client = drive.running(name, "evaluate", kind="eval")[0]
    env = client["spec"]["containers"][0]["env"]
    assert {"name": "EGM_ENDPOINTS", "value": "http://here:1"} in env and {
        "name": "EGM_RESULTS",
        "value": "s3://bucket/eval",
    } in env
    assert drive.pods(name, "server", kind="eval") == []


def test_one_name_for_a_training_and_its_evaluation(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, output="s3://bucket/out"))
    drive.api.create("gej", drive.namespace, eval_job(name, 1, model={"trainJob": name}))
    until("to wait", lambda: drive.status(name, "gej").get("reason") == "UpstreamNotReady")
    drive.end(name, "rl", 0)
    drive.phase(name, "Succeeded")
    drive.prepared(name, kind="eval")
    server = drive.running(name, "server", kind="eval")[0]
    argv = server["spec"]["containers"][0]["command"]
    assert argv[argv.index("--model") + 1] == "s3://bucket/out/model"
