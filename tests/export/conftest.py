"""Make tests/unit/report/samples.py importable. These tests need inspect_ai, wandb and trackio: `make test-export`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "report"))
