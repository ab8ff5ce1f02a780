"""The queue and priority of a job: `spec.queue` is a shorthand for a label, and a job that has both is refused."""

from __future__ import annotations

from typing import Any

import pytest

from grounding.api import read
from grounding.api.handed_down import QUEUE_LABEL, kueue_labels, plain_labels, queue_of, read_from


def _job(labels: dict[str, str], **spec: Any) -> Any:
    body = {"model": {"source": "hf://x/y"}, "data": {"root": "/d", "images": ["/i"]}, **spec}
    meta = {"name": "j", "labels": labels}
    return read(
        {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingEvalJob", "metadata": meta, "spec": body}
    )


@pytest.mark.parametrize(
    ("labels", "spec", "queue"),
    [
        ({}, {}, None),
        ({}, {"queue": "a"}, "a"),
        ({QUEUE_LABEL: "a"}, {}, "a"),
        ({QUEUE_LABEL: "a"}, {"queue": "a"}, "a"),
    ],
)
def test_the_queue_of_a_job(labels: dict[str, str], spec: dict[str, Any], queue: str | None) -> None:
    job, _ = _job(labels, **spec)
    assert queue_of(job) == queue and kueue_labels(job).get(QUEUE_LABEL) == queue


def test_label_and_field_that_disagree_are_a_mistake() -> None:
    job, found = _job({QUEUE_LABEL: "a"}, queue="b")
    assert job is None and found[0].field == "spec.queue" and "Leave one of them out" in found[0].message


def test_a_label_that_names_no_queue_is_a_mistake() -> None:
    job, found = _job({QUEUE_LABEL: "A b"})
    assert job is None and found[0].field == "spec.queue"


def test_labels_that_mean_the_object_itself_stay_with_it() -> None:
    kept = {"team": "a", "example.com/x": "b", "scheduling.x-k8s.io/pod-group": "g", "mykubernetes.io.example/x": "c"}
    lost = dict.fromkeys(
        ["app.kubernetes.io/name", "grounding.egm.dev/uid", "helm.toolkit.fluxcd.io/name", QUEUE_LABEL], "x"
    )
    job, _ = _job(kept | lost)
    assert plain_labels(job) == kept


def test_annotations_of_other_tools_are_not_part_of_the_job() -> None:
    ours = {"kueue.x-k8s.io/podset-slice-size": "2", "grounding.egm.dev/restart": "1"}
    assert read_from(ours | {"kubectl.kubernetes.io/last-applied-configuration": "{}"}) == ours
