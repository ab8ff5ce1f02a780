"""How the objects that own the pods of a gang are written: one row a kind. What the operator reads of them follows from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from egm_operator.kinds import JOB, PYTORCHJOB, Kind
from grounding.jsontypes import Document


@dataclass(frozen=True)
class GangForm:
    """Where a kind has what all of them have.

    `suspend`: path below `spec` of the switch that keeps pods away; `managedBy` is beside it.
    `succeeded`, `failed`: types of the conditions that say how it ends, any of which
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

    def managed_by(self, spec: Mapping[str, object]) -> str:
        """Return the controller that a spec names to make the pods; empty for the kind's own."""
        found: object = spec
        for name in (*self.suspend[:-1], "managedBy"):
            found = found.get(name) if isinstance(found, Mapping) else None
        return "" if found is None else str(found)

    def switches(self, spec: Mapping[str, object]) -> Document:
        """Return the parts of a spec that are read: the switch, and who makes the pods."""
        manager = self.managed_by(spec)
        return self._beside({self.suspend[-1]: self.suspended(spec)} | ({"managedBy": manager} if manager else {}))

    def suspension(self, suspend: bool) -> Document:
        """Return the part of a spec that says whether pods are wanted."""
        return self._beside({self.suspend[-1]: suspend})

    def _beside(self, found: Document) -> Document:
        """Return the part of a spec that has some fields where the switch is."""
        for name in reversed(self.suspend[:-1]):
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
