"""The actions of a plan, and the decision of a policy. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from egm_operator.kube.objects import Manifest, Owned
from egm_operator.status import ConditionType, Reason, S, StatusBuilder, short, stamp
from grounding.api.status import Phase
from grounding.jsontypes import Document


@dataclass(frozen=True)
class Delete:
    """Delete an object if it still has this uid. `force`: without waiting for its node, which is lost."""

    kind: str
    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True)
class Patch:
    """Apply a JSON merge patch to an object if it still has this uid."""

    kind: str
    name: str
    uid: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """An Event to post on the job."""

    reason: str
    message: str
    warning: bool = False


@dataclass
class Plan:
    """The actions in their order: `create` and `patch`, then `events`, then `status` (None: nothing to write), then `delete`, then `further`.

    The status is written before objects are deleted, because it records what the deleted objects reported. `further`: objects to create without
    which the job continues; if the API server refuses one, the other actions have been carried out. `at`: latest time of the next planning.
    """

    create: list[Manifest] = field(default_factory=list)
    patch: list[Patch] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    status: Document | None = None
    delete: list[Delete] = field(default_factory=list)
    further: list[Manifest] = field(default_factory=list)
    at: float | None = None


@dataclass
class Decision(Generic[S]):
    """The decision of a policy. `final`: no further policy is called; otherwise the next one sees the status that this one has set."""

    status: StatusBuilder[S]
    plan: Plan = field(default_factory=Plan)
    final: bool = True

    def passing(self) -> Decision[S]:
        """Mark the decision as not final, so that the next policy is called."""
        self.final = False
        return self

    def add(self, other: Decision[S]) -> None:
        """Add another policy's decision."""
        self.status = other.status
        self.plan.create += other.plan.create
        self.plan.patch += other.plan.patch
        self.plan.events += other.plan.events
        self.plan.delete += other.plan.delete
        self.plan.further += other.plan.further
        if other.plan.at is not None:
            self.look_again(other.plan.at)

    def create(self, *objects: Manifest) -> None:
        """Create objects in this order."""
        self.plan.create.extend(objects)

    def create_further(self, *objects: Manifest) -> None:
        """Create objects in this order after everything else, because the job continues without them."""
        self.plan.further.extend(objects)

    def remove(self, *objects: Owned) -> None:
        """Delete objects, unless they are being deleted already."""
        self.plan.delete.extend(Delete(one.kind, one.name, one.uid) for one in objects if not one.deleting)

    def force(self, *objects: Owned) -> None:
        """Delete objects without waiting for their lost nodes. Only for objects that have nothing to save and cannot overwrite anything."""
        self.plan.delete.extend(Delete(one.kind, one.name, one.uid, force=True) for one in objects)

    def patch(self, obj: Owned, body: Mapping[str, Any]) -> None:
        """Apply a merge patch to an object."""
        self.plan.patch.append(Patch(obj.kind, obj.name, obj.uid, body))

    def look_again(self, at: float) -> None:
        """Plan again at the time `at` at the latest."""
        self.plan.at = at if self.plan.at is None else min(self.plan.at, at)

    def event(self, reason: Reason, message: str, warning: bool = False) -> None:
        """Post an Event."""
        self.plan.events.append(Event(str(reason), short(message), warning))

    def finish(self, success: bool, reason: Reason, message: str) -> None:
        """End the job with success or failure."""
        status = self.status
        kind, phase = (ConditionType.SUCCEEDED, Phase.SUCCEEDED) if success else (ConditionType.FAILED, Phase.FAILED)
        status.condition(kind, True, reason, message)
        if status.get(ConditionType.RUNNING) is not None:
            status.condition(ConditionType.RUNNING, False, reason, "The job has ended.")
        if status.is_true(ConditionType.RESTARTING):
            status.condition(ConditionType.RESTARTING, False, reason, "The job has ended.")
        status.phase(phase, reason, message)
        status.fields.completion_time = stamp(status.now)
        status.forget_eta()
        self.event(reason, message, warning=not success)
