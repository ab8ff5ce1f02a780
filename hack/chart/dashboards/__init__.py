"""Grafana dashboards as code: `everything()` gives their JSON by name. `make chart` writes it to charts/egm/dashboards.

Each module is one dashboard; `kit` is what they share. A query is tried against a real Prometheus by tests/cluster/test_monitoring.py.
"""

from __future__ import annotations

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import evaluation, fleet, operator, training


def everything() -> dict[str, str]:
    """JSON by file name."""
    made = {m.__name__.rpartition(".")[2]: m.dashboard() for m in (fleet, training, evaluation, operator)}
    return {
        f"{name}.json": json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for name, board in made.items()
    }
