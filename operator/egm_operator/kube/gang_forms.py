"""The kinds of objects that own the pods of a gang: a table of the fields in which they differ. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from egm_operator.kinds import JOB, PYTORCHJOB, Kind
from grounding.jsontypes import Document


@dataclass(frozen=True)
class GangForm:
    """The fields of one kind that owns gangs.

    `suspend`: path below `spec` of the switch that stops its pods; `managedBy` is in the same section. `succeeded`, `failed`: condition types
    that report its end; any of them is enough. `first_label`: label and value that its controller sets on the pod of rank 0. `disruption`:
    reason of the failed condition, and a word in its message, that report a disruption; None if the kind does not distinguish disruptions.
    """

    kind: Kind
    suspend: tuple[str, ...]
    succeeded: tuple[str, ...]
    failed: tuple[str, ...]
    first_label: tuple[str, str]
    disruption: tuple[str, str] | None = None

    def suspended(self, spec: Mapping[str, object]) -> bool:
        """Return whether a spec stops the pods."""
        found: object = spec
        for name in self.suspend:
            found = found.get(name) if isinstance(found, Mapping) else None
        return bool(found)

    def managed_by(self, spec: Mapping[str, object]) -> str:
        """Return the controller in `managedBy` of a spec, which creates the pods; empty for the kind's own controller."""
        found: object = spec
        for name in (*self.suspend[:-1], "managedBy"):
            found = found.get(name) if isinstance(found, Mapping) else None
        return "" if found is None else str(found)

    def switches(self, spec: Mapping[str, object]) -> Document:
        """Return the parts of a spec that plans read: `suspend` and `managedBy`."""
        manager = self.managed_by(spec)
        return self._beside({self.suspend[-1]: self.suspended(spec)} | ({"managedBy": manager} if manager else {}))

    def suspension(self, suspend: bool) -> Document:
        """Return the part of a spec that stops or allows the pods."""
        return self._beside({self.suspend[-1]: suspend})

    def _beside(self, found: Document) -> Document:
        """Return the part of a spec that has these fields in the section that contains `suspend`."""
        for name in reversed(self.suspend[:-1]):
            found = {name: found}
        return found


PYTORCHJOB_FORM = GangForm(
    PYTORCHJOB, ("runPolicy", "suspend"), ("Succeeded",), ("Failed",), ("training.kubeflow.org/replica-type", "master")
)
JOB_FORM = GangForm(
    JOB,
    ("suspend",),
    # SuccessCriteriaMet is set first, while the pods of the other ranks are still ending
    ("Complete", "SuccessCriteriaMet"),
    ("Failed",),
    ("batch.kubernetes.io/job-completion-index", "0"),
    ("PodFailurePolicy", "DisruptionTarget"),
)
FORMS: dict[str, GangForm] = {form.kind.name: form for form in (PYTORCHJOB_FORM, JOB_FORM)}
"""Name of a kind -> its form"""
FIRST_LABELS = tuple(form.first_label for form in FORMS.values())
