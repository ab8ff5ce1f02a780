"""The samples of the report's unit tests, as a module. These tests need inspect_ai, wandb and trackio: `make test-export`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "report"))
