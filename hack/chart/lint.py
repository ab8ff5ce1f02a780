"""checkov over the chart as each file of charts/egm/ci renders it: `make lint-chart`.

What is skipped stands in charts/egm/.checkov.yaml, with the reason. Helm is $HELM, the one that `make cluster` has built, or the one on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "egm"
sys.path.insert(0, str(ROOT / "hack" / "cluster"))
import binaries  # noqa: E402


def main() -> int:
    """Render and check."""
    built = binaries.cache() / "bin" / "helm"
    helm = os.environ.get("HELM") or (str(built) if built.exists() else shutil.which("helm"))
    if helm is None:
        raise SystemExit("error: there is no helm: `make cluster` builds one")
    failed = 0
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            rendered = Path(folder) / f"{values.stem}.yaml"
            render = [
                helm,
                "template",
                "egm",
                str(CHART),
                "--kube-version=1.34.4",
                "-n",
                "egm-system",
                "-f",
                str(values),
            ]
            rendered.write_text(subprocess.run(render, check=True, capture_output=True, text=True).stdout)
            command = [
                str(ROOT / ".cache/checkov/bin/checkov"),
                "-f",
                str(rendered),
                "--framework",
                "kubernetes",
                "--compact",
                "--quiet",
            ]
            failed |= subprocess.run(
                [*command, "--skip-download", "--config-file", str(CHART / ".checkov.yaml")]
            ).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
