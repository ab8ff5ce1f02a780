"""What a person with the chart's editor role can do, on a real control plane: create jobs, but get no pod with more rights than the
restricted level, and no Secret that the job does not name. A job whose podTemplate has a wrong shape says so in a condition.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster.chart_kit import CHART, account_kubeconfig, deployed, helm
from tests.cluster.operator_kit import Api, Drive, eval_job, fresh_name, kubeconfig, new_namespace, train_job, until
from tests.unit.api.test_pod_template import ODD
from tests.unit.operator.test_policy import ESCAPES

pytestmark = pytest.mark.timeout(300)
KINDS = {"gtj": train_job, "gej": eval_job}


@dataclass(frozen=True)
class Editor:
    """A service account whose only rights are the editor role and the viewer role of a release."""

    api: Api
    namespace: str
    token: str

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Return status and text of the API server's answer."""
        return self.api.answer(self.token, method, path, body)

    def submit(self, kind: str, name: str, template: object) -> tuple[int, str]:
        """Create a job with this podTemplate; return the API server's answer."""
        job = KINDS[kind](name)
        job["spec"]["podTemplate"] = template
        return self.ask("POST", self.api.path(kind, self.namespace), job)


def _bind(api: Api, namespace: str, release: str, folder: Path) -> str:
    """Create the account with its rights in the namespace, and return its token."""
    api.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "person"}})
    bindings = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings"
    subject = {"kind": "ServiceAccount", "name": "person", "namespace": namespace}
    for role in ("viewer", "editor"):
        reference = {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": f"{release}-{role}",
        }
        api.request("POST", bindings, {"metadata": {"name": role}, "roleRef": reference, "subjects": [subject]})
    config = account_kubeconfig(api, namespace, "person", folder / "person.kubeconfig")
    return str(YAML(typ="safe").load(config.read_text())["users"][0]["user"]["token"])


@pytest.fixture(scope="module")
def editor(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    del cluster  # the fixture has started it
    api, release, folder = Api(kubeconfig()), fresh_name("egm"), tmp_path_factory.mktemp("editor")
    with new_namespace(api, "system") as system, new_namespace(api, "team") as team:
        values = f"crds.install=false,fullnameOverride={release},watchNamespaces={{{team}}}"
        helm("install", release, str(CHART), "-n", system, "--set", values)
        operator = deployed(api, system, folder, release).start()
        try:
            yield Editor(api, team, _bind(api, team, release, folder))
        finally:
            operator.stop()
            helm("uninstall", release, "-n", system)


def _objects(api: Api, namespace: str) -> dict[str, list[Any]]:
    """Return all pods and owners of pods in the namespace, by the name of their job."""
    found: dict[str, list[Any]] = {}
    for kind in ("pod", "job", "pytorchjob"):
        for obj in api.list(kind, namespace):
            found.setdefault(obj["metadata"]["labels"].get("grounding.egm.dev/job", ""), []).append(obj)
    return found


def _failed(editor: Editor, jobs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the condition `Failed` of each job (name -> kind), once each of them has it."""
    found: dict[str, dict[str, Any]] = {}

    def look() -> bool:
        for kind in KINDS:
            for job in editor.api.list(kind, editor.namespace):
                for condition in job.get("status", {}).get("conditions", []):
                    if condition["type"] == "Failed" and condition["status"] == "True":
                        found[job["metadata"]["name"]] = condition
        return found.keys() >= jobs.keys()

    try:
        until("the conditions", look)
    except AssertionError:
        raise AssertionError(f"no condition Failed: {sorted(jobs.keys() - found.keys())}") from None
    return {name: found[name] for name in jobs}


def test_an_editor_creates_jobs_and_nothing_else(editor: Editor) -> None:
    namespace = f"/api/v1/namespaces/{editor.namespace}"
    pod = {"metadata": {"name": "own"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
    assert editor.submit("gtj", "allowed", {})[0] == 201
    drive = Drive(editor.api, editor.namespace)
    drive.phase("allowed", "Running", "Preparing", "Pending")
    made = until("the job's pods or their owner", lambda: _objects(editor.api, editor.namespace).get("allowed"))
    assert made
    for method, path, body in (
        ("POST", f"{namespace}/pods", pod),
        ("POST", f"/apis/batch/v1/namespaces/{editor.namespace}/jobs", {"metadata": {"name": "own"}}),
        ("GET", f"{namespace}/secrets", None),
        ("GET", f"{namespace}/secrets/egm", None),
        ("POST", f"{namespace}/secrets", {"metadata": {"name": "own"}}),
        ("POST", f"{namespace}/serviceaccounts/default/token", {"spec": {}}),
        ("PATCH", f"{editor.api.path('gtj', editor.namespace, 'allowed')}/status", {"status": {"phase": "Succeeded"}}),
    ):
        status, text = editor.ask(method, path, body)
        assert status == 403, (method, path, status, text)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_template_gets_more_than_the_restricted_level(editor: Editor, kind: str) -> None:
    jobs = {f"{kind}-{number}": name for number, name in enumerate(ESCAPES)}
    for name, escape in jobs.items():
        status, text = editor.submit(kind, name, ESCAPES[escape])
        assert status == 201, text
    for name, condition in _failed(editor, dict.fromkeys(jobs, kind)).items():
        assert jobs[name].strip() in condition["message"], (jobs[name], condition)
    made = _objects(editor.api, editor.namespace)
    assert not made.keys() & jobs.keys(), json.dumps({n: made[n] for n in made.keys() & jobs.keys()})[:2000]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_odd_shape_is_refused_or_is_a_condition(editor: Editor, kind: str) -> None:
    jobs: dict[str, str] = {}
    for number, (template, field) in enumerate(ODD):
        name = f"{kind}-odd-{number}"
        try:
            json.dumps(template, allow_nan=False)
        except ValueError:  # JSON has no infinity, so no client can send it
            continue
        status, text = editor.submit(kind, name, template)
        if status == 201:
            jobs[name] = field
        else:
            assert status in (400, 422), (template, status, text)
    assert len(jobs) > len(ODD) // 2, "most shapes should pass the schema of the definition"
    for name, condition in _failed(editor, jobs).items():
        assert f"spec.podTemplate.{jobs[name]}" in condition["message"], (jobs[name], condition)
    assert not _objects(editor.api, editor.namespace).keys() & jobs.keys()
