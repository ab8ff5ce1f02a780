"""A real Prometheus scrapes jobs in every state (`scene`) by the chart's monitors and answers every query of every panel and alert."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster import scene
from tests.cluster.chart_kit import CHART, ROOT, of_kind, template
from tests.cluster.operator_kit import Api, Drive, Operator, free_port, kubeconfig, new_namespace, until
from tests.cluster.prometheus_kit import Prometheus, promtool, scrape_config, settle

pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("EGM_KUBECONFIG")), reason="only the test cluster has simulated pods"),
    pytest.mark.timeout(600),
]
RULES = YAML(typ="safe").load((CHART / "rules" / "alerts.yaml").read_text())
ALERTS = {r["alert"]: r for g in RULES["groups"] for r in g["rules"]}
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((CHART / "dashboards").glob("*.json"))}
VARIABLES = {"$__rate_interval": "20s", "$__range": "10m", "$__interval": "5s", "$namespace": ".*", "$job": ".*"}


class Fleet:
    """The running parts: the operator, Prometheus and the targets, with the time of their start."""

    def __init__(self, prometheus: Prometheus, operator: Operator, ports: dict[str, int], namespace: str) -> None:
        self.prometheus, self.operator, self.ports, self.namespace = prometheus, operator, ports, namespace
        self.begun = time.time()


def _pod(address: int, namespace: str, pod: str, job: str, kind: str, **labels: str) -> dict[str, str]:
    found = {"grounding.egm.dev/job": job, "grounding.egm.dev/kind": kind, **labels}
    return {
        "address": f"127.0.0.1:{address}",
        "namespace": namespace,
        "pod": pod,
        **{f"label:{k}": v for k, v in found.items()},
    }


@pytest.fixture(scope="module")
def fleet(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    del cluster
    api, folder = Api(kubeconfig()), tmp_path_factory.mktemp("monitoring")
    patch = pytest.MonkeyPatch()
    monitors = template("--set", "metrics.podMonitor.enabled=true,metrics.serviceMonitor.enabled=true")
    pods = {m["metadata"]["name"].removeprefix("egm-"): m for m in of_kind(monitors, "PodMonitor")}
    (service,) = of_kind(monitors, "ServiceMonitor")
    with new_namespace(api, "watched") as namespace, new_namespace(api, "full") as quota:
        port = free_port()
        settings = {
            "EGM_OPERATOR_PROGRESS_STALE_SECONDS": "4",
            "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "2",
            "EGM_OPERATOR_HEALTH_PORT": str(port),
        }
        operator = Operator(
            f"{namespace},{quota}", folder / "operator.log", EGM_OPERATOR_HEALTH_HOST="127.0.0.1", **settings
        ).start()
        (folder / "trainings").mkdir()
        (folder / "evaluation").mkdir()
        with (
            scene.trainings(folder / "trainings", patch, falls_at=8) as trainings,
            scene.evaluation(folder / "evaluation", patch, rows=400) as evaluation,
            scene.engines() as engines,
        ):
            ports = {"operator": port, "evaluation": evaluation, **trainings, **engines}
            scrapes = [
                scrape_config(service, [{"address": f"127.0.0.1:{port}", "namespace": "egm", "pod": "egm-operator-0"}]),
                scrape_config(
                    pods["trainings"],
                    [_pod(p, namespace, f"{n}-a1-master-0", n, "train") for n, p in trainings.items()],
                ),
                scrape_config(pods["evaluations"], [_pod(evaluation, namespace, "asks-eval-client-1", "asks", "eval")]),
                scrape_config(
                    pods["servers"],
                    [_pod(p, namespace, f"{n}-eval-server-0", "asks", "eval") for n, p in engines.items()],
                ),
            ]
            made = Fleet(Prometheus(folder, scrapes, RULES), operator, ports, namespace)
            scene.fleet(Drive(api, namespace), quota)
            # a while without an API server: requests that get no answer
            script = [sys.executable, str(ROOT / "hack/cluster/cluster.py"), "restart", "kube-apiserver"]
            subprocess.run(script, check=True, capture_output=True)
            until("the API server", lambda: _answers(api), 60)
            settle(25)
            yield made
            made.prometheus.stop()
        assert operator.stop() == 0
    patch.undo()


def _answers(api: Api) -> bool:
    try:
        return bool(api.request("GET", "/version"))
    except OSError:
        return False


def _expand(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def _queries(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for panel in panels:
        yield from _queries(panel.get("panels") or [])
        for target in panel.get("targets") or []:
            yield panel["title"], target["expr"]


def test_every_target_is_up(fleet: Fleet) -> None:
    found = {t["labels"]["job"]: t["health"] for t in fleet.prometheus.scraped()}
    assert set(found) == {f"egm-system/egm-{n}" for n in ("operator", "trainings", "evaluations", "servers")}
    assert set(found.values()) == {"up"}


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_every_query_of_every_panel_has_data(fleet: Fleet, name: str) -> None:
    queries = list(_queries(BOARDS[name]["panels"]))
    assert len(queries) > 10
    # this figure shows 0 instead of nothing; without the 0, only a phase of two seconds would give a value here
    bare = [(title, expr.removesuffix(" or vector(0)")) for title, expr in queries if title != "Restarting"]
    queries += [pair for pair in bare if pair not in queries]
    empty = [f"{title}: {expr}" for title, expr in queries if not fleet.prometheus.query(_expand(expr))]
    assert empty == []


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_every_variable_has_values(fleet: Fleet, name: str) -> None:
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found, variable
        values = fleet.prometheus.api(f"label/{found[2]}/values", **{"match[]": _expand(found[1])})
        assert fleet.namespace in values or "asks" in values or "learns" in values, (variable["name"], values)


# a test cannot reach the thresholds of alerts (hours, shares of all requests), so this pattern finds them, to be replaced by ones that always
# hold
_THRESHOLD = re.compile(r"(?<![=!~])(>=|>|<|==)\s*[\d.]+(\s*\*\s*[\d.]+)?(?=\s|$|\))")


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_every_alert_is_about_series_that_there_are(fleet: Fleet, name: str) -> None:
    """The alert's condition, or the same with thresholds that always hold, has a value. (test_alerts.py tests when it fires.)"""
    expr = ALERTS[name]["expr"]
    if expr.startswith("absent("):
        assert fleet.prometheus.query(expr.removeprefix("absent(").removesuffix(")"))
        return
    if not fleet.prometheus.query(expr):
        loose = _THRESHOLD.sub(lambda m: "< 1e15" if m[1] == "<" else ">= -1e15", expr)
        assert loose != expr and fleet.prometheus.query(loose), loose


def test_alerts_of_the_fleet_fire_and_carry_the_job(fleet: Fleet) -> None:
    """Alerts whose condition is met are pending or firing, with the labels that their texts use."""
    found: dict[str, list[dict[str, Any]]] = {}
    for alert in fleet.prometheus.api("alerts")["alerts"]:
        found.setdefault(alert["labels"]["alertname"], []).append(alert)
    jobs = {
        "EgmJobFailed": "fails", "EgmJobImagePull": "pulls", "EgmJobRefused": "refused", "EgmJobGpusIdle": "idle", "EgmTrainingSilent": "silent",
        "EgmTrainingUnhealthy": "learns", "EgmEvaluationServersMissing": "asks", "EgmEvaluationErrors": "asks",
    }  # fmt: skip
    for name, job in jobs.items():
        assert job in {a["labels"]["job_name"] for a in found.get(name, [])}, (name, sorted(found))
    assert "EgmOperatorForbidden" in found  # the quota refuses Jobs
    assert "EgmOperatorDown" not in found and "EgmOperatorBlind" not in found
    for alert in (a for many in found.values() for a in many):
        assert "<no value>" not in alert["annotations"]["summary"] + alert["annotations"]["description"], alert


# a job that the alert could be about
SUBJECTS = {
    "EgmJobFailed": ("GroundingTrainJob", "fails"),
    "EgmJobStuck": ("GroundingTrainJob", "too-big"), "EgmJobImagePull": ("GroundingTrainJob", "pulls"),
    "EgmJobRefused": ("GroundingTrainJob", "learns"),
    "EgmJobRestarting": ("GroundingTrainJob", "restarts"), "EgmJobGpusIdle": ("GroundingEvalJob", "idle"),
    "EgmTrainingStalled": ("GroundingTrainJob", "learns"), "EgmTrainingUnsaved": ("GroundingTrainJob", "silent"),
    "EgmTrainingNotUploaded": ("GroundingTrainJob", "learns"),
    "EgmTrainingSilent": ("GroundingTrainJob", "silent"), "EgmEvaluationServersMissing": ("GroundingEvalJob", "asks"),
    "EgmEvaluationErrors": ("GroundingEvalJob", "asks"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_what_a_runbook_says_to_look_at_is_there(fleet: Fleet, cluster: Any, name: str) -> None:
    """Run the runbook's commands that read objects; logs and addresses of pods are not simulated."""
    kind, job = SUBJECTS[name]
    text = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text()
    commands = [line.strip() for line in text.splitlines() if line.startswith("    kubectl -n NAMESPACE ")]
    ran = 0
    for command in commands:
        words = shlex.split(command.split(" | ")[0].split(" # ")[0])[1:]
        if words[2] not in ("get", "describe"):
            continue
        words = [w.replace("NAMESPACE", fleet.namespace).replace("KIND", kind).replace("NAME", job) for w in words]
        done = cluster.run(*words)
        assert done.returncode == 0 and "No resources found" not in done.stderr, (words, done.stderr)
        ran += 1
    assert ran, text


def test_series_of_one_job_can_be_joined_across_sources(fleet: Fleet) -> None:
    """The monitors give the series of pods the same labels as the operator's series."""
    joined = "egm_train_score * on (namespace, kind, job_name) group_left egm_job_status"
    assert {s["metric"]["job_name"] for s in fleet.prometheus.query(joined)} == {"learns"}
    engines = "sglang:num_running_reqs * on (namespace, kind, job_name) group_left egm_job_status"
    assert {s["metric"]["kind"] for s in fleet.prometheus.query(engines)} == {"GroundingEvalJob"}
    for label in ("exported_job", "exported_endpoint"):
        assert fleet.prometheus.query(f'{{__name__=~"egm_.*", {label}!=""}}') == []
    asked = {s["metric"]["endpoint"] for s in fleet.prometheus.query("egm_eval_endpoint_limit")}
    assert len(asked) == 2 and "127.0.0.1:9" in asked  # the label names servers, not the client's port
    assert fleet.prometheus.query("sglang:max_total_num_tokens") == []  # the monitor does not keep this series


def test_promtool_has_nothing_to_say_about_the_metrics(fleet: Fleet) -> None:
    for name in ("operator", "evaluation", "learns", "done"):
        done = promtool("check", "metrics", stdin=scene.text_of(fleet.ports[name]))
        assert done.returncode == 0 and not done.stdout + done.stderr, f"{name}: {done.stdout}{done.stderr}"


def test_without_an_operator_somebody_is_woken(tmp_path: Path) -> None:
    """If the operator ends, its series become stale at the next scrape, and the alert's condition holds."""
    (service,) = of_kind(template("--set", "metrics.serviceMonitor.enabled=true"), "ServiceMonitor")
    expr = ALERTS["EgmOperatorDown"]["expr"]
    with scene.texts({"operator": "egm_operator_leader 1\n"}) as ports:
        target = {"address": f"127.0.0.1:{ports['operator']}", "namespace": "egm", "pod": "egm-operator-0"}
        prometheus = Prometheus(tmp_path, [scrape_config(service, [target])], RULES)
        until("a leader", lambda: prometheus.query("egm_operator_leader"), 30)
        assert prometheus.query(expr) == []
    until("absence", lambda: prometheus.query(expr), 30)
    prometheus.stop()
