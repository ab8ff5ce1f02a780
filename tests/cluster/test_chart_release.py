"""A release on a real API server: every object is accepted, and running jobs survive upgrade, rollback and uninstall."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.chart_kit import CHART, CI, deployed, helm, template
from tests.cluster.operator_kit import Api, Drive, eval_job, kubeconfig, new_namespace, train_job, until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def api(cluster: Any) -> Api:
    del cluster  # the fixture has started it
    return Api(kubeconfig())


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    with new_namespace(api, "release") as name:
        yield name


@pytest.mark.parametrize("values", CI, ids=lambda p: p.name.removesuffix("-values.yaml"))
def test_the_server_takes_every_object(values: Path, cluster: Any, monitoring: None) -> None:
    """A dry run on the server accepts every object, with strict schemas, defaults, CEL rules and admission."""
    del monitoring
    objects = template("-f", str(values))
    wanted = {o["metadata"].get("namespace") for o in objects} - {None}
    made = [n for n in sorted(wanted) if cluster.run("create", "namespace", n).returncode == 0]
    try:
        for where in {o["metadata"].get("namespace", "default") for o in objects}:
            mine = [o for o in objects if o["metadata"].get("namespace", "default") == where]
            done = replace(cluster, namespace=where).run(
                *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"),
                stdin={"apiVersion": "v1", "kind": "List", "items": mine},
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("serverside-applied") == len(mine)
    finally:
        for name in made:
            cluster("delete", "namespace", name)


def test_the_pod_may_run_at_the_restricted_level(api: Api, namespace: str, cluster: Any) -> None:
    cluster("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    (deployment,) = [o for o in template(namespace=namespace) if o["kind"] == "Deployment"]
    pod = {**deployment["spec"]["template"], "apiVersion": "v1", "kind": "Pod"}
    pod["metadata"] = {**pod["metadata"], "name": "restricted", "namespace": namespace}
    pod["spec"] = {**pod["spec"], "serviceAccountName": "default"}
    done = cluster.run("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    assert done.returncode == 0, done.stderr


def test_who_may_view_or_edit_a_namespace_may_do_so_with_its_jobs(namespace: str, cluster: Any) -> None:
    helm("install", "aggregate", str(CHART), "-n", namespace, "--set", "crds.install=false,rbac.create=false")
    try:
        for role in ("view", "edit"):
            cluster("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", "-n", namespace)

        def may(user: str, verb: str, what: str, *more: str) -> bool:
            return (
                cluster.run("auth", "can-i", verb, what, *more, "-n", namespace, f"--as={user}").stdout.strip() == "yes"
            )

        until("aggregation", lambda: may("viewer", "list", "groundingtrainjobs.grounding.egm.dev"))
        kinds = ("groundingtrainjobs.grounding.egm.dev", "groundingevaljobs.grounding.egm.dev")
        for kind in kinds:
            assert (
                may("viewer", "watch", kind) and not may("viewer", "create", kind) and not may("viewer", "delete", kind)
            )
            until("aggregation", lambda k=kind: may("editer", "create", k))  # type: ignore[misc]
            assert may("editer", "delete", kind) and may("editer", "patch", kind)
            assert not may("editer", "patch", kind, "--subresource=status")
    finally:
        helm("uninstall", "aggregate", "-n", namespace)


def _older(folder: Path) -> Path:
    """Return a chart as an earlier version could be: a column is missing, and settings differ."""
    chart = folder / "egm"
    shutil.copytree(CHART, chart)
    meta = chart / "Chart.yaml"
    meta.write_text(meta.read_text().replace("version: 0.1.0", "version: 0.0.9"))
    crd = chart / "templates" / "crd-groundingtrainjobs.yaml"
    text = crd.read_text()
    before = "    - name: Score\n      type: string\n      jsonPath: .status.columns.score\n"
    assert text.count(before) == 1
    crd.write_text(text.replace(before, ""))
    return chart


def _columns(cluster: Any) -> list[str]:
    found = cluster.get("crd", "groundingtrainjobs.grounding.egm.dev")
    return [c["name"] for c in found["spec"]["versions"][0]["additionalPrinterColumns"]]


def test_jobs_outlive_upgrade_rollback_and_uninstall(api: Api, namespace: str, cluster: Any, tmp_path: Path) -> None:
    drive = Drive(api, namespace)
    settings = ["--set", f"watchNamespaces={{{namespace}}},rbac.aggregateRoles=false,fullnameOverride=egm"]
    # `egm crds` has installed the definitions: a release takes them over with the right flag
    helm("install", "egm", str(_older(tmp_path)), "-n", namespace, "--take-ownership", *settings)
    assert "Score" not in _columns(cluster)

    def start(number: int) -> Any:
        folder = tmp_path / str(number)
        folder.mkdir()
        return deployed(
            api,
            namespace,
            folder,
            EGM_OPERATOR_LEASE_SECONDS="3",
            EGM_OPERATOR_PROGRESS_VIA="off",
            EGM_OPERATOR_BACKOFF_BASE_SECONDS="1",
        ).start()

    operator = start(0)
    drive.api.create("gtj", namespace, train_job("long", nodes=2))
    drive.api.create("gej", namespace, eval_job("asks", 2))
    drive.prepared("long")
    drive.prepared("asks", kind="eval")
    drive.phase("long", "Running")
    drive.phase("asks", "Running", kind="gej")

    def running() -> dict[str, str]:
        return {
            p["metadata"]["name"]: p["metadata"]["uid"]
            for p in api.list("pod", namespace)
            if p["status"].get("phase") == "Running" and "-operator-" not in p["metadata"]["name"]
        }

    before = running()
    assert len(before) == 2 + 3

    def unharmed(what: str) -> None:
        assert running() == before, what
        assert drive.status("long")["attempt"] == 1 and drive.status("asks", "gej")["attempt"] == 1
        assert drive.status("long")["phase"] == "Running" and drive.status("asks", "gej")["phase"] == "Running"

    def rolled(number: int) -> Any:
        """Act as if the Deployment's pod has changed: the new one starts, then the old one is stopped."""
        fresh = start(number)
        until("its start", lambda: "started" in fresh.log.read_text())
        assert operator.stop() == 0
        until("it to lead", lambda: "leads" in fresh.log.read_text(), 30)
        time.sleep(2)
        return fresh

    helm("upgrade", "egm", str(CHART), "-n", namespace, *settings, "--set", "settings.workers=4")
    assert "Score" in _columns(cluster)
    operator = rolled(1)
    unharmed("upgrade")
    helm("rollback", "egm", "1", "-n", namespace)
    assert "Score" not in _columns(cluster)
    operator = rolled(2)
    unharmed("rollback")
    helm("uninstall", "egm", "-n", namespace)
    assert operator.stop() in (0, 1)  # without rights, it may be unable to release the Lease
    assert cluster.get("crd", "groundingtrainjobs.grounding.egm.dev")["metadata"]["name"]
    left = {n for n in api.everything(namespace) if n.split("/")[1].startswith("egm")}
    assert left <= {"leases/egm-operator"}, left
    unharmed("uninstall")
    # install again: the release owns the kept definitions, and the jobs continue to their end
    helm("install", "egm", str(CHART), "-n", namespace, *settings)
    operator = start(3)
    drive.end("long", "rl", 0, count=2)
    drive.end("asks", "evaluate", 0, kind="eval")
    drive.phase("long", "Succeeded")
    drive.phase("asks", "Succeeded", kind="gej")
    assert operator.stop() == 0
    helm("uninstall", "egm", "-n", namespace)


def test_a_packaged_chart_is_the_chart(tmp_path: Path) -> None:
    helm("package", str(CHART), "-d", str(tmp_path))
    (package,) = tmp_path.glob("egm-*.tgz")
    assert template(chart=package) == template()


def test_the_notes_name_the_next_commands(namespace: str) -> None:
    values = "settings.storageSecret=s3,crds.install=false,rbac.aggregateRoles=false"
    install = ("install", "egm", str(CHART), "-n", namespace, "--dry-run=server", "--set")
    notes = helm(*install, values + ",image.registry=host.example/egm").stdout.split("NOTES:")[1]
    assert "rollout status deployment/egm-operator" in notes and "create secret generic s3" in notes
    assert "kubectl get gtj,gej -A" in notes and "jobs/egm8b-pipeline.yaml" in notes and "WARNING" not in notes
    assert (
        "egm doctor --cluster" in notes
        and "host.example/egm/egm-train:dev-gpu and host.example/egm/egm-infer:dev-sglang" in notes
    )
    pasted = helm(*install, values).stdout.split("NOTES:")[1]
    assert "WARNING: image.registry is localhost, which is no registry" in pasted and "make images push" in pasted
