"""The seam to whatever runs a gang: a back end builds the objects of an attempt; `kube/gang_forms.py` says how their state is read. Pure.

A further back end is a module that builds it, a row here, a row there, its kind in `kinds.py`, and its rights in the chart (docs/backends.md).
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
    """`wanted` returns all objects of an attempt, in the order in which they are made; `cure`: what to do in a cluster without its kind."""

    form: GangForm
    wanted: Callable[[Role, Role, Context, int], list[Manifest]]
    cure: str = ""

    def missing(self, absent: Set[str]) -> bool:
        """Return whether a cluster that lacks some kinds cannot run it."""
        return self.form.kind.name in absent


BACKENDS: dict[str, Backend] = {
    "pytorchjob": Backend(
        PYTORCHJOB_FORM, pytorchjob.wanted, "install the Kubeflow training-operator v1.9, or set backend to job"
    ),
    "job": Backend(JOB_FORM, indexed_job.wanted),
}
"""By the words of `spec.backend`. `auto` takes the first one whose kind the cluster has."""


def chosen(wanted: BackendName | None, default: BackendName, absent: Set[str]) -> Backend:
    """Return the back end of a job that wants one, or None, in a cluster that lacks some kinds: it may be one of those."""
    word = default if wanted is None else wanted
    if word != AUTO:
        return BACKENDS[word]
    return next(backend for backend in BACKENDS.values() if not backend.missing(absent) or backend.form is JOB_FORM)


def suspension(owner: Suspendable, suspend: bool) -> Document:
    """Return the merge patch that stops the pods of an object, or lets them come back.

    A note on the object says that this operator has suspended it. It resumes nothing else: a queue suspends objects too.
    """
    mark = {ANNOTATION_SUSPENDED: "true" if suspend else None}
    return {"metadata": {"annotations": mark}, "spec": FORMS[owner.kind].suspension(suspend)}
