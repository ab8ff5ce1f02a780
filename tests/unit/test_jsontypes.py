"""Only the listed modules, which read data from outside, may name the type of unparsed objects."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LIBRARY = {
    "api/as_written.py": "specs as written, before they are validated",
    "api/common.py": "pod templates: parts of a PodTemplateSpec as users write them",
    "api/crd.py": "the JSON schema that pydantic makes",
    "api/manifest.py": "manifests: YAML before it is validated",
    "api/resolved.py": "specs as written, merged before they are validated",
    "cli/evaluate.py": "--extra-body: fields of a request as users write them",
    "data/flip.py": "rows of users' files, of which all fields are kept",
    "data/importers.py": "rows of users' files",
    "data/records.py": "rows of users' files",
    "evaluate/costs.py": "config.json of a model",
    "evaluate/guard.py": "rows of users' files",
    "evaluate/reply.py": "replies of servers",
    "evaluate/rescoring.py": "run_config.json of another version",
    "evaluate/results/conditions.py": "run_config.json of another version",
    "evaluate/results/config.py": "run_config.json of another version",
    "evaluate/results/extents.py": "stored rows before they are checked",
    "evaluate/results/samples.py": "stored rows before they are checked",
    "evaluate/results/writer.py": "stored rows before they are checked",
    "files.py": "the readers of JSON",
    "jsontypes.py": "the type itself",
    "local/runs.py": "state.json before it is validated",
    "models/estimate.py": "config.json of models",
    "models/folder.py": "config.json and its like in a model's folder",
    "progress.py": "lines of a trainer's log",
    "report/collect.py": "run.json of another version",
    "scoring/own_reward.py": "extra_info, which verl hands to a user's function",
    "scoring/rows.py": "rows that users have scored, of which all fields are kept",
    "storage/fetch.py": "a journal that a crash may have cut short",
    "storage/parts.py": "a journal that a crash may have cut short",
    "train/checkpoints/local.py": "metrics as verl names them",
    "train/rl/ray_cluster.py": "Ray's list of nodes",
    "train/rl/resume.py": "metrics as verl names them",
    "train/rl/reward.py": "extra_info, which verl hands to a reward",
    "train/sft/masters.py": "state of torch's optimizer",
    "train/sft/trainer.py": "inputs and state that transformers hands over",
    "train/verl/cpu.py": "what verl hands over",
    "train/verl/cpu_patches.py": "what verl hands over",
    "train/verl/hooks.py": "what verl hands over",
    "train/verl/patches.py": "what verl hands over",
    "view/cluster.py": "jobs as the API server stores them",
    "view/tails.py": "rows and progress lines that a run is writing",
}
"""Module of the library that names JsonObject -> which data from outside it reads"""

OPERATOR = {
    "cli/actions.py",
    "cli/doctor.py",
    "cli/screen.py",
    "controller/handlers.py",
    "controller/main.py",
    "controller/progress_poller.py",
    "controller/reconciler.py",
    "controller/waiting_reader.py",
    "controller/warnings_reader.py",
    "kube/cache.py",
    "kube/client.py",
    "kube/cluster.py",
    "kube/leader.py",
    "kube/objects.py",
    "manifests/merge.py",
    "manifests/places.py",
    "manifests/pod.py",
    "manifests/policy.py",
    "metrics/exposition.py",
    "metrics/jobs.py",
    "plan/snapshot.py",
    "snapshot.py",
}
"""Modules of the operator that name Raw: objects as the API server sends them, and users' pod templates"""


def naming(package: str, word: str) -> set[str]:
    """Return the modules of a package whose text contains a word."""
    top = ROOT / package
    found = {p: p.read_text() for p in top.rglob("*.py")}
    return {p.relative_to(top).as_posix() for p, text in found.items() if re.search(rf"\b{word}\b", text)}


def test_only_the_edges_of_the_library_hold_unparsed_objects():
    assert naming("grounding", "JsonObject") == LIBRARY.keys()


def test_only_the_edges_of_the_operator_hold_unparsed_objects():
    assert naming("operator/egm_operator", "Raw") == OPERATOR
    assert naming("operator/egm_operator", "JsonObject") == {"kube/objects.py"}


@pytest.mark.parametrize("package", ["grounding", "operator/egm_operator"])
def test_an_object_of_any_kind_has_a_name_that_says_so(package):
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (ROOT / package).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bdict\[str, Any\]|\bh\.[a-z_]+ or ", line)
    }
    assert {line.partition(":")[0] for line in found} <= {"grounding/jsontypes.py"}, sorted(found)
