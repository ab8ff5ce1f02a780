"""A platform engineer follows docs/install.md: every command of the page runs as it is written, in the page's order, on a cluster with a real
node that pulls the images from a registry. Only the registry's name differs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

from registry import DIRECT

from grounding.api import KINDS
from tests.install.conftest import ROOT, Machine
from tests.unit.test_docs_commands import blocks

PAGE = ROOT / "docs" / "install.md"
EXAMPLE = "registry.example.org"
"""The registry of the page, which the test replaces by its own"""


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a fence, each with its continued lines and its here-document; comments are left out."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = [line]
        while found[-1].endswith("\\"):
            found.append(next(lines))
        if document := re.search(r"<<(\w+)$", found[-1]):
            found += iter(lambda: next(lines), document[1])
            found.append(document[1])
        yield "\n".join(found)


def test_the_commands_of_a_fence_are_separated() -> None:
    text = "# a comment\na \\\n    --b   # c\n\nd <<EOF\n# e\nf\nEOF\ng\n"
    assert list(commands(text)) == ["a \\\n    --b   # c", "d <<EOF\n# e\nf\nEOF", "g"]


class _Walk:
    """The walk along the page: runs commands, prints them with their time, and checks what the page promises after them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.done: list[str] = []

    def run(self, command: str) -> None:
        """Run a command of the page. It must succeed, and `egm doctor` must find no fault of the installation."""
        command = command.replace(EXAMPLE, self.machine.registry)
        began = time.monotonic()
        done = self.machine.sh(command)
        output = done.stdout
        print(f"\n$ {command}\n{output[-2500:]}({time.monotonic() - began:.0f} s)", flush=True)
        failed = re.findall(r"^FAILED +(\S+)", output, re.MULTILINE) if "egm doctor" in command else []
        # the training-operator of the test cluster is a process of this machine and not a Deployment
        assert done.returncode == 0 or failed == ["training-operator"], command
        self.done.append(command)
        for beginning, check in self.checks.items():
            if command.startswith(beginning):
                check(self, output)

    def json(self, command: str) -> dict[str, object]:
        """Return the object that `kubectl COMMAND` prints as JSON."""
        found: dict[str, object] = json.loads(self.machine.ok(f"kubectl {command} -o json"))
        return found

    def pushed(self, _: str) -> None:
        """The registry has all three images with the tag of the command."""
        (tag,) = re.findall(r" TAG=(\w+)", self.done[-1])
        for name, wanted in (("operator", tag), ("train", f"{tag}-cpu"), ("infer", f"{tag}-cpu")):
            with DIRECT.open(f"http://{self.machine.registry}/v2/egm/egm-{name}/tags/list") as answer:
                assert wanted in json.load(answer)["tags"]

    def operator_runs(self, _: str) -> None:
        """The operator's pod runs the image of the newest push, pulled from the registry."""
        (tag,) = re.findall(r" TAG=(\w+)", [c for c in self.done if "make images push" in c][-1])
        image = self.machine.ok("kubectl -n egm get deployment egm-operator -o jsonpath='{..containers[0].image}'")
        assert image == f"{self.machine.registry}/egm/egm-operator:{tag}"
        assert self.definitions() == set(KINDS)

    def definitions(self) -> set[str]:
        """Return the kinds that the cluster knows."""
        kinds = "{range .items[?(@.spec.group=='grounding.egm.dev')]}{.spec.names.kind} {end}"
        return set(self.machine.ok(f'kubectl get crd -o jsonpath="{kinds}"').split())

    def shown(self, output: str) -> None:
        assert "first" in output, output

    def learned(self, _: str) -> None:
        """The job's pod ran the pushed image, and its result is on the claim."""
        status = self.json("-n team-a get gtj/first")["status"]
        assert isinstance(status, dict) and status["phase"] == "Succeeded" and status["progress"]["step"] == 40
        images = self.machine.ok("kubectl -n team-a get pods -o jsonpath='{..containers[*].image}'").split()
        assert images and {i.rpartition(":")[0] for i in images} == {f"{self.machine.registry}/egm/egm-train"}, images
        assert (self.machine.volume / "first" / "model").is_dir()

    def upgraded(self, output: str) -> None:
        assert output.count("deployed") == 1 and output.count("superseded") == 1, output

    def cancelled(self, _: str) -> None:
        """The job and its pods are deleted; the files stay."""
        end = time.monotonic() + 60
        while (left := self.machine.ok("kubectl -n team-a get gtj,pods -o name")) and time.monotonic() < end:
            time.sleep(1)
        assert left == "" and (self.machine.volume / "first" / "model").is_dir()

    def uninstalled(self, _: str) -> None:
        """Definitions are kept; the release leaves nothing else."""
        assert self.definitions() == set(KINDS)
        left = self.machine.ok(
            "kubectl -n egm get deployment,service,serviceaccount,configmap,secret,role -o name"
        ).split()
        assert set(left) <= {"serviceaccount/default", "configmap/kube-root-ca.crt"}, left
        assert "egm" not in self.machine.ok("kubectl get clusterrole,clusterrolebinding -o name")

    def removed(self, _: str) -> None:
        assert self.definitions() == set()

    checks: ClassVar[dict[str, Callable[[_Walk, str], None]]] = {
        "sudo make images push": pushed,
        "kubectl -n egm rollout status": operator_runs,
        ".venv/bin/egm top": shown,
        "kubectl -n team-a wait gtj/first": learned,
        "helm history": upgraded,
        ".venv/bin/egm cancel": cancelled,
        "helm uninstall": uninstalled,
        "kubectl delete crd": removed,
    }


def test_the_page_is_enough(machine: Machine) -> None:
    walk = _Walk(machine)
    for block in blocks(PAGE.read_text()):
        assert block.language == "sh" and block.needs == "cluster", f"{PAGE.name}:{block.line}"
        for command in commands(block.text):
            if "buildah login" not in command:  # the registry has no accounts
                walk.run(command)
    unused = [b for b in walk.checks if not any(c.startswith(b) for c in walk.done)]
    assert not unused, f"the page no longer has a command that begins with {unused}"
    assert machine.sh("kubectl get namespace egm").returncode != 0
