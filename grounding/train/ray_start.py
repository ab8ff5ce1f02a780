"""`ray start`, with more patience than Ray has: it gives its daemons 30 s to come up, and a cold disk or a busy machine needs more.

Started by `ray_cluster.py` as `python -m grounding.train.ray_start start …`. To be dropped once Ray makes that time a setting.
"""

from __future__ import annotations

import time
from typing import Any

import ray._private.services as services
from ray.scripts.scripts import main

PATIENCE_S = 180.0
_get_node = services.get_node


def _patient_get_node(*args: Any, **kwargs: Any) -> Any:
    """Ray's own look-up of the node that it has just started, tried until it is there."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


if __name__ == "__main__":
    services.get_node = _patient_get_node
    main()
