"""The interface of the back ends that run a gang. A back end builds the objects of an attempt; `kube/gang_forms.py` describes their state. Pure.

A new back end needs a module that builds the objects, a row in both tables, its kind in `kinds.py`, and its rights in the chart
(docs/backends.md).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from egm_operator.kube.gang_forms import FORMS, JOB_FORM, PYTORCHJOB_FORM, GangForm
from egm_operator.kube.objects import Manifest, Suspendable
from egm_operator.manifests import indexed_job, pytorchjob
from egm_operator.manifests.pod import Context
from egm_operator.names import ANNOTATION_SUSPENDED
from grounding.api.train_spec import AUTO, BackendName
from grounding.jsontypes import Document
from grounding.roles import Role


@dataclass(frozen=True)
class Backend:
    """`wanted` returns all objects of an attempt in the order of creation. `cure`: what to do if the cluster lacks the back end's kind."""

    form: GangForm
    wanted: Callable[[Role, Role, Context, int], list[Manifest]]
    cure: str = ""

    def missing(self, absent: Set[str]) -> bool:
        """Return whether the kinds `absent` include one that the back end needs."""
        return self.form.kind.name in absent


BACKENDS: dict[str, Backend] = {
    "pytorchjob": Backend(
        PYTORCHJOB_FORM, pytorchjob.wanted, "install the Kubeflow training-operator v1.9, or set backend to job"
    ),
    "job": Backend(JOB_FORM, indexed_job.wanted),
}
"""Value of `spec.backend` -> back end. `auto` selects the first one whose kind the cluster has"""


def chosen(wanted: BackendName | None, default: BackendName, absent: Set[str]) -> Backend:
    """Return the back end for a job's `spec.backend` (None: not set) in a cluster without the kinds `absent`. Its kind may be absent."""
    word = default if wanted is None else wanted
    if word != AUTO:
        return BACKENDS[word]
    return next(backend for backend in BACKENDS.values() if not backend.missing(absent) or backend.form is JOB_FORM)


def suspension(owner: Suspendable, suspend: bool) -> Document:
    """Return the merge patch that stops the pods of an object, or allows them again.

    An annotation records that this operator has suspended the object. The operator resumes no other objects, because a queue suspends some too.
    """
    mark = {ANNOTATION_SUSPENDED: "true" if suspend else None}
    return {"metadata": {"annotations": mark}, "spec": FORMS[owner.kind].suspension(suspend)}
