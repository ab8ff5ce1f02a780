"""Settings of the operator: every one by environment, listed in docs/operator.md."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields

from grounding.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the environment says. Names are `EGM_` and the field in capitals."""

    namespaces: tuple[str, ...] = ()
    """Namespaces served, comma separated; empty: the whole cluster."""
    train_image: str = "localhost/egm-train:dev"
    """Image of prepare and training pods."""
    infer_image: str = "localhost/egm-infer:dev"
    """Image of server and client pods."""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secret: str = ""
    """Secret in the job's namespace for pulling the images."""
    default_output: str = ""
    """Where jobs without spec.output write: `pvc://claim/path` or `s3://bucket/path`; namespace and name are appended."""
    storage_secret: str = ""
    """Secret in the job's namespace whose keys become environment of every pod (S3 credentials, HF_TOKEN); referenced, never read."""
    gpu_resource: str = "nvidia.com/gpu"
    run_as_user: int = 1000
    grace_seconds: int = 120
    """terminationGracePeriodSeconds of training pods: what a checkpoint may take after SIGTERM."""
    service_account: str = ""
    """Service account of the pods; empty: the namespace's default. No token is mounted in either case."""
    backoff_base_seconds: float = 10.0
    """Wait before the second attempt; doubled with each further one."""
    backoff_limit_seconds: float = 360.0
    server_start_seconds: float = 600.0
    """How long, beyond the engine's own limit, the first server may take (image, model)."""
    progress_seconds: float = 15.0
    """Time between two readings of a job's `/progress`."""
    progress_via: str = "pod"
    """pod: HTTP to the pod's address; proxy: through the API server; off: annotations alone."""
    progress_stale_seconds: float = 120.0
    """After this long without an answer the condition ProgressAvailable says so."""
    workers: int = 8
    """Jobs reconciled at once."""
    resync_seconds: float = 600.0
    """Time between full listings, which repair whatever a watch has missed."""
    leader_elect: bool = True
    lease_name: str = "egm-operator"
    lease_namespace: str = ""
    """Namespace of the Lease; empty: the operator's own, or `default` outside a cluster."""
    lease_seconds: int = 15
    identity: str = ""
    """Name in the Lease; empty: host name and process id."""
    health_port: int = 8080
    """Port of /healthz, /readyz and /metrics; 0: none."""
    health_host: str = "0.0.0.0"  # noqa: S104  # probes come from the kubelet
    metrics_jobs: int = 10000
    """Jobs with series of their own on /metrics, at most; totals count all."""
    log_level: str = "INFO"
    log_format: str = "json"
    """json or text."""

    @property
    def holder(self) -> str:
        """This process's name in the Lease."""
        return self.identity or f"{socket.gethostname()}_{os.getpid()}"


def load(environ: Mapping[str, str]) -> Settings:
    """Settings of an environment. Raises `UserError` that names the variable."""
    values: dict[str, object] = {}
    for field in fields(Settings):
        name = f"EGM_{field.name.upper()}"
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            if field.type == "int":
                values[field.name] = int(text)
            elif field.type == "float":
                values[field.name] = float(text)
            elif field.type == "bool":
                values[field.name] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            elif field.name == "namespaces":
                values[field.name] = tuple(sorted({n.strip() for n in text.split(",") if n.strip()}))
            else:
                values[field.name] = text
        except (ValueError, KeyError):
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(
                str(field.type), "a text"
            )
            raise UserError(f"expected {kind}, found {text!r}", field=name) from None
    settings = Settings(**values)  # type: ignore[arg-type]
    for field_name, allowed in (("progress_via", ("pod", "proxy", "off")), ("log_format", ("json", "text"))):
        if (found := getattr(settings, field_name)) not in allowed:
            raise UserError(f"expected one of {', '.join(allowed)}, found {found!r}", field=f"EGM_{field_name.upper()}")
    if settings.workers < 1:
        raise UserError("expected at least 1", field="EGM_WORKERS")
    return settings
