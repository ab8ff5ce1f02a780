"""A real Prometheus for tests, with promtool: Debian's package, unpacked by `make prometheus`, or one on PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import free_port, until

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """Return the path of prometheus or promtool. Without one, skip the test, or fail in CI."""
    unpacked = ROOT / ".cache" / "prometheus" / "usr" / "bin" / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {name}: `make prometheus`")
        pytest.skip(f"there is no {name}: `make prometheus`")
    return found


def promtool(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *argv], input=stdin, capture_output=True, text=True, timeout=60)


class Prometheus:
    """A Prometheus server with its data in one folder; it scrapes every second."""

    def __init__(self, folder: Path, scrapes: Iterable[Mapping[str, Any]], rules: Mapping[str, Any]) -> None:
        self.port, self.folder = free_port(), folder
        (folder / "rules.json").write_text(json.dumps(rules))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.json"],
            "scrape_configs": list(scrapes),
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        done = promtool("check", "config", str(folder / "prometheus.yml"))
        assert done.returncode == 0, done.stdout + done.stderr
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            cwd=folder,
            stdout=self._log,
            stderr=self._log,
        )
        until("Prometheus", self._ready, 30)

    def _ready(self) -> bool:
        assert self.process.poll() is None, (self.folder / "prometheus.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def api(self, path: str, **query: Any) -> Any:
        """Return the data of an answer. Fails with Prometheus' message."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the series of an instant query that have a value now."""
        data = self.api("query", query=expr)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return [r for r in data["result"] if r["value"][1] not in ("NaN", "+Inf", "-Inf")]

    def scraped(self) -> list[dict[str, Any]]:
        """Return the present targets and their states."""
        return list(self.api("targets", state="active")["activeTargets"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self._log.close()


_SNAKE = re.compile(r"(?<!^)(?=[A-Z])")


def _relabel(rules: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{_SNAKE.sub("_", k).lower(): v for k, v in rule.items()} for rule in rules]


def scrape_config(monitor: Mapping[str, Any], targets: Iterable[Mapping[str, str]], name: str = "") -> dict[str, Any]:
    """Return the scrape configuration that a monitor of the Prometheus operator means, for given targets.

    A target has `address`, `namespace`, `pod`, and the pod's labels under `label:NAME`.
    """
    endpoint = (monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"])[0]
    groups = []
    for target in targets:
        labels = {
            "namespace": target["namespace"],
            "pod": target["pod"],
            "container": "main",
            "endpoint": endpoint["port"],
        }
        meta = {
            "__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", k.removeprefix("label:")): v
            for k, v in target.items()
            if k.startswith("label:")
        }
        groups.append({"targets": [target["address"]], "labels": labels | meta})
    return {
        "job_name": f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}{name}",
        "honor_labels": endpoint.get("honorLabels", False),
        "metrics_path": endpoint["path"],
        "static_configs": groups,
        "relabel_configs": _relabel(endpoint.get("relabelings", ())),
        "metric_relabel_configs": _relabel(endpoint.get("metricRelabelings", ())),
    }


def settle(seconds: float) -> None:
    """Wait until rates have enough samples."""
    time.sleep(seconds)
