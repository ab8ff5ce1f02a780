"""Grafana dashboards as code: `everything()` returns their JSON by file name. `make chart` writes it to charts/egm/dashboards.

Each module builds one dashboard; `kit` has the common parts. tests/cluster/test_monitoring.py runs every query on a real Prometheus.
"""

from __future__ import annotations

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import evaluation, fleet, operator, training


def everything() -> dict[str, str]:
    """Return the JSON of all dashboards by file name."""
    made = {m.__name__.rpartition(".")[2]: m.dashboard() for m in (fleet, training, evaluation, operator)}
    return {
        f"{name}.json": json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for name, board in made.items()
    }
