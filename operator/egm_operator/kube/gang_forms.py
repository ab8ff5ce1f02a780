"""How the objects that own the pods of a gang are written: one row a kind. What the operator reads of them follows from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from egm_operator.kinds import JOB, PYTORCHJOB, Kind
from grounding.jsontypes import Document


@dataclass(frozen=True)
class GangForm:
    """Where a kind has what all of them have.

    `suspend`: path below `spec` of the switch that keeps pods away; `succeeded`, `failed`: types of the conditions that say how it ends, any of which
    is enough; `first_label`: label and value that its controller gives the pod of rank 0; `disruption`: reason of the failed condition and a word of
    its message that say that a disruption ended it, None if it does not tell disruptions apart.
    """

    kind: Kind
    suspend: tuple[str, ...]
    succeeded: tuple[str, ...]
    failed: tuple[str, ...]
    first_label: tuple[str, str]
    disruption: tuple[str, str] | None = None

    def suspended(self, spec: Mapping[str, object]) -> bool:
        """Return whether a spec says that no pods are wanted."""
        found: object = spec
        for name in self.suspend:
            found = found.get(name) if isinstance(found, Mapping) else None
        return bool(found)

    def suspension(self, suspend: bool) -> Document:
        """Return the part of a spec that says whether pods are wanted."""
        *outer, last = self.suspend
        found: Document = {last: suspend}
        for name in reversed(outer):
            found = {name: found}
        return found


PYTORCHJOB_FORM = GangForm(
    PYTORCHJOB, ("runPolicy", "suspend"), ("Succeeded",), ("Failed",), ("training.kubeflow.org/replica-type", "master")
)
JOB_FORM = GangForm(
    JOB,
    ("suspend",),
    ("Complete", "SuccessCriteriaMet"),  # the second comes first, while the pods of the other ranks still end
    ("Failed",),
    ("batch.kubernetes.io/job-completion-index", "0"),
    ("PodFailurePolicy", "DisruptionTarget"),
)
FORMS: dict[str, GangForm] = {form.kind.name: form for form in (PYTORCHJOB_FORM, JOB_FORM)}
"""By the name of the kind."""
FIRST_LABELS = tuple(form.first_label for form in FORMS.values())
