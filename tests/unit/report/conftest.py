"""Make samples.py in this folder importable as `samples`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
