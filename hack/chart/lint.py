"""Run checkov and kube-score on the chart, rendered with each file of charts/egm/ci: `make lint-chart`.

charts/egm/.checkov.yaml lists the skipped checks of checkov, and `IGNORED` those of kube-score, with reasons.
Helm is $HELM, the one built by `make cluster`, or the one on PATH.
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

# Pull policy: see .checkov.yaml. Replicas: one replica works, and a second is only a standby that users can enable by `replicas: 2`.
IGNORED = ("container-image-pull-policy", "deployment-replicas")


def kube_score(rendered: Path) -> int:
    """Run kube-score, built from its pinned module, and return its exit code; return 0 if Go is not installed."""
    if shutil.which("go") is None:
        sys.stderr.write("kube-score is skipped, because Go is not installed\n")
        return 0
    command = ["go", "run", "github.com/zegl/kube-score/cmd/kube-score", "score", "--kubernetes-version=v1.34"]
    command += ["--output-format=ci", "--exit-one-on-warning", *(f"--ignore-test={name}" for name in IGNORED)]
    env = {**os.environ, "GOFLAGS": "-mod=readonly", "GOWORK": "off", "CGO_ENABLED": "0"}
    done = subprocess.run(
        [*command, str(rendered)], cwd=ROOT / "hack/chart/score", env=env, capture_output=True, text=True
    )
    told = [line for line in done.stdout.splitlines() if not line.startswith(("[OK", "[SKIPPED"))]
    sys.stdout.write("".join(f"kube-score: {line}\n" for line in told or ["no findings"]))
    sys.stderr.write(done.stderr)
    return done.returncode


def main() -> int:
    """Render the chart and run both checks."""
    built = binaries.cache() / "bin" / "helm"
    helm = os.environ.get("HELM") or (str(built) if built.exists() else shutil.which("helm"))
    if helm is None:
        raise SystemExit("error: helm is not installed; `make cluster` builds it")
    failed = 0
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            rendered = Path(folder) / f"{values.stem}.yaml"
            render = [helm, "template", "egm", str(CHART), "--kube-version=1.34.4", "-n", "egm-system"]
            done = subprocess.run([*render, "-f", str(values)], check=True, capture_output=True, text=True)
            rendered.write_text(done.stdout)
            checkov = [str(ROOT / ".cache/checkov/bin/checkov"), "-f", str(rendered), "--framework", "kubernetes"]
            checkov += ["--compact", "--quiet", "--skip-download", "--config-file", str(CHART / ".checkov.yaml")]
            failed |= subprocess.run(checkov).returncode | kube_score(rendered)
    return failed


if __name__ == "__main__":
    sys.exit(main())
