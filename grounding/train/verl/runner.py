"""Start verl's `main_ppo` on several nodes, with its runner on the pod that starts it.

Ray may place the runner on any pod. It must be rank 0's, because the role there reads the runner's files, and the pods may share no folder.
Started by `run.py` as `python -m grounding.train.verl.runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import verl.trainer.main_ppo as theirs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches


@dataclass(frozen=True)
class Here:
    """Replaces verl's class of the runner: the same class, whose actors run on the Ray node of the process that creates them."""

    runner: Any
    given: Mapping[str, Any] = field(default_factory=dict)

    def options(self, **given: Any) -> Here:
        """Return the class with options of Ray, as verl calls it."""
        return Here(self.runner, {**self.given, **given})

    def remote(self) -> Any:
        """Create the actor."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return self.runner.options(**self.given, scheduling_strategy=here).remote()


PATCHES = (
    Patch(
        theirs,
        "TaskRunnerV1",
        Here(theirs.TaskRunnerV1),
        "Ray may place verl's runner on any pod, but the role on rank 0's pod reads the runner's files.",
        "verl has a setting for the node of its runner.",
        "",  # an actor's class has no source; `Here` calls nothing of it but Ray's own methods
    ),
)


def apply() -> None:
    """Apply the patch."""
    apply_patches(PATCHES)


if __name__ == "__main__":
    apply()
    theirs.main()
