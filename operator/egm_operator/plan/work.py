"""What a plan is made of, and the desk that policies work at. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from egm_operator.build.pod import Context
from egm_operator.observe import Observed, deleting
from egm_operator.settings import Settings
from egm_operator.status import Condition, Draft, Phase, Reason, short, stamp
from egm_operator.store import Raw
from grounding.api import Job
from grounding.roles import Role


@dataclass(frozen=True)
class Delete:
    """Delete an object, if it is still the one with this uid."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Patch:
    """A JSON merge patch of an object, if it is still the one with this uid."""

    kind: str
    name: str
    uid: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """An Event on the job."""

    reason: str
    message: str
    warning: bool = False


@dataclass
class Plan:
    """What to do, in this order: `create` and `patch`, then `events`, then `status` (None: nothing to write), then `delete`.

    Status stands before deletions: what a deleted object told must be written down before it is gone. `at`: when to look again at the latest.
    """

    create: list[Raw] = field(default_factory=list)
    patch: list[Patch] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    status: Raw | None = None
    delete: list[Delete] = field(default_factory=list)
    at: float | None = None


@dataclass
class Work:
    """One planning of one job: what is seen, what is decided so far."""

    seen: Observed
    job: Job
    settings: Settings
    now: float
    draft: Draft
    plan: Plan = field(default_factory=Plan)
    ctx: Context | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)

    @property
    def place(self) -> Context:
        """The context for builders; there is one as soon as model and output are known."""
        if self.ctx is None:
            raise AssertionError("no context before the model is known")
        return self.ctx

    def create(self, *objects: Raw) -> None:
        """Make these objects, in this order."""
        self.plan.create.extend(objects)

    def remove(self, obj: Raw | None) -> None:
        """Delete an object, unless it is going already."""
        if obj is not None and not deleting(obj):
            meta = obj["metadata"]
            self.plan.delete.append(Delete(obj["kind"], meta["name"], meta["uid"]))

    def patch(self, obj: Raw, body: Mapping[str, Any]) -> None:
        """Change an object."""
        meta = obj["metadata"]
        self.plan.patch.append(Patch(obj["kind"], meta["name"], meta["uid"], body))

    def look_again(self, at: float) -> None:
        """Plan again at `at` at the latest."""
        self.plan.at = at if self.plan.at is None else min(self.plan.at, at)

    def tell(self, reason: Reason, message: str, warning: bool = False) -> None:
        """Post an Event."""
        self.plan.events.append(Event(str(reason), short(message), warning))

    def finish(self, success: bool, reason: Reason, message: str) -> None:
        """The job has ended."""
        kind, phase = (Condition.SUCCEEDED, Phase.SUCCEEDED) if success else (Condition.FAILED, Phase.FAILED)
        self.draft.condition(kind, True, reason, message)
        if self.draft.get(Condition.RUNNING):
            self.draft.condition(Condition.RUNNING, False, reason, "The job has ended.")
        if self.draft.is_true(Condition.RESTARTING):
            self.draft.condition(Condition.RESTARTING, False, reason, "The job has ended.")
        self.draft.phase(phase, reason, message)
        self.draft.new["completionTime"] = stamp(self.now)
        self.draft.new.pop("etaSeconds", None)
        self.tell(reason, message, warning=not success)
