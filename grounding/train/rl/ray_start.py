"""Run `ray start` with a longer timeout. Ray gives its daemons 30 s to start, but a cold disk or a busy machine needs more.

Started by `ray_cluster.py` as `python -m grounding.train.rl.ray_start start …`.
"""

from __future__ import annotations

import time
from typing import Any

import ray._private.services as services
from ray.scripts.scripts import main

from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches

PATIENCE_S = 180.0
_get_node = services.get_node


def _patient_get_node(*args: Any, **kwargs: Any) -> Any:
    """Do what Ray's function does, but look the node that Ray has just started up again until it exists."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


PATCHES = (
    Patch(
        services,
        "get_node",
        _patient_get_node,
        "`ray start` gives its daemons 30 s to start, which is too little on a cold disk or a busy machine.",
        "Ray has a setting for that time.",
        "68e58c15b903",
    ),
)


def apply() -> None:
    """Apply the patch."""
    apply_patches(PATCHES)


if __name__ == "__main__":
    apply()
    main()
