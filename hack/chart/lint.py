"""checkov over the chart as each file of charts/egm/ci renders it: `make lint-chart`.

What is skipped stands in charts/egm/.checkov.yaml, with the reason.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CHART = ROOT / "charts" / "egm"


def main() -> int:
    """Render and check."""
    from tests.cluster.chart_kit import CI, VERSION, helm

    failed = 0
    for values in CI:
        with tempfile.TemporaryDirectory() as folder:
            rendered = Path(folder) / f"{values.stem}.yaml"
            made = helm("template", "egm", str(CHART), VERSION, "-n", "egm-system", "-f", str(values)).stdout
            rendered.write_text(made)
            command = [
                str(ROOT / ".cache/checkov/bin/checkov"),
                "-f",
                str(rendered),
                "--framework",
                "kubernetes",
                "--compact",
                "--quiet",
            ]
            done = subprocess.run([*command, "--skip-download", "--config-file", str(CHART / ".checkov.yaml")])
            failed |= done.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
