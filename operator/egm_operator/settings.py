"""Settings of the operator, read from environment variables that begin with `EGM_OPERATOR_`.

The table in docs/operator.md is generated from this file, and a test compares the chart's values with it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import Annotated, Literal

import orjson
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from grounding.api.base import Output
from grounding.api.train_spec import BackendName
from grounding.errors import UserError

PREFIX = "EGM_OPERATOR_"
_OF_A_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_[0-9]|$)")


def _names(value: object) -> object:
    """Split a comma separated list and sort it, so that equal sets compare equal."""
    return tuple(sorted({n.strip() for n in value.split(",") if n.strip()})) if isinstance(value, str) else value


def _objects(value: object) -> object:
    """Check that a text is a JSON list of objects."""
    if isinstance(value, str):
        found = orjson.loads(value)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ValueError("expected a JSON list of objects")
    return value


Objects = Annotated[str, BeforeValidator(_objects)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
WholeSeconds = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """The settings from the environment. A variable's name is `EGM_OPERATOR_` plus the field in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    namespaces: Names = ()
    """Namespaces served, comma separated; empty: the whole cluster."""
    train_image: str = "localhost/egm-train:dev-cpu"
    """Image of prepare and training pods."""
    infer_image: str = "localhost/egm-infer:dev-cpu"
    """Image of server and client pods."""
    image_pull_policy: str = "IfNotPresent"
    """imagePullPolicy of all pods."""
    image_pull_secret: str = ""
    """Secret in the job's namespace for pulling the images."""
    backend: BackendName = "auto"
    """What runs trainings without spec.backend: `pytorchjob`, `job` (an Indexed Job), `auto` (PyTorchJob if the cluster has it, else `job`)."""
    default_output: str = ""
    """Where jobs without spec.output write: `pvc://claim/path` or `s3://bucket/path`; namespace and name of the job are appended."""
    storage_secret: str = ""
    """Secret in the job's namespace whose keys become environment variables of every pod (S3 credentials, HF_TOKEN). The operator never reads it."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    run_as_user: Annotated[int, Field(ge=0)] = 1000
    """User and group of the pods, and group of their volumes; 0: not set, so that the cluster chooses them (OpenShift)."""
    grace_seconds: WholeSeconds = 120
    """terminationGracePeriodSeconds of the pods. Roles get it minus a margin as `EGM_GRACE_SECONDS`; a checkpoint and its upload must fit."""
    service_account: str = ""
    """Service account of the pods; empty: the namespace's default. No token is mounted in either case."""
    pod_template: Literal["allow", "restricted", "deny"] = "restricted"
    """What a job's podTemplate may contain. restricted: nothing beyond the restricted Pod Security level, and only the Secrets listed here or in
    the job's own fields; allow: anything that the cluster allows; deny: no podTemplate."""
    pod_template_secrets: Names = ()
    """Secrets that a podTemplate may read, comma separated."""
    image_registries: Names = ()
    """Registries whose images a podTemplate may use, comma separated; empty: all."""
    tracking_hosts: Names = ()
    """Further hosts (`name` or `name:port`, comma separated) to which keys for Weights & Biases and MLflow may be sent."""
    network_policies: bool = False
    """Whether each job gets a NetworkPolicy that only allows connections from its own pods and the peers below."""
    network_telemetry_from: Objects = "[]"
    """Peers that may reach port 8090 of jobs' pods (`/progress`, `/metrics`), such as the operator, as `from` of a NetworkPolicy, in JSON."""
    network_scrape_from: Objects = "[]"
    """Peers that may reach port 8090, and port 8000 of servers, such as Prometheus, in the same form."""
    network_egress: Objects = "[]"
    """Peers to which jobs' pods may connect in addition to each other and name servers, as `egress` of a NetworkPolicy, in JSON; empty: all."""
    backoff_base_seconds: Seconds = 10.0
    """Time before the second attempt; doubled for each further one."""
    backoff_limit_seconds: Seconds = 360.0
    """Maximum time before an attempt."""
    server_start_seconds: Seconds = 600.0
    """Time from when a server's pod has a node until it must answer; the engine's own limit is added to it."""
    node_lost_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """Time for which a pod may exist after its grace period until its node counts as lost, and the job continues without waiting for it."""
    progress_seconds: Seconds = 15.0
    """Time between two requests for a job's `/progress`."""
    progress_via: Literal["pod", "proxy", "off"] = "pod"
    """pod: HTTP to the pod's address; proxy: through the API server; off: only annotations."""
    progress_stale_seconds: Seconds = 120.0
    """Time without an answer after which the condition ProgressAvailable becomes False."""
    workers: Annotated[int, Field(ge=1)] = 8
    """Maximum number of jobs that are reconciled at the same time."""
    resync_seconds: Seconds = 600.0
    """Time between full listings, which make up for missed watch events."""
    leader_elect: bool = True
    """Whether to use a Lease; false for one replica."""
    lease_name: str = "egm-operator"
    """Name of the Lease."""
    lease_namespace: str = ""
    """Namespace of the Lease; empty: the operator's own, or `default` outside a cluster."""
    lease_seconds: Annotated[int, Field(ge=1)] = 15
    """Time for which the Lease is valid without renewal."""
    identity: str = ""
    """This process's name in the Lease; empty: host name and process id."""
    health_port: Port = 8080
    """Port of /healthz, /readyz and /metrics; 0: none."""
    health_host: str = ""
    """Address of the health port; empty: all addresses, IPv4 and IPv6."""
    metrics_jobs: Annotated[int, Field(ge=0)] = 10000
    """Maximum number of jobs with their own series on /metrics; totals count all."""
    log_level: str = "INFO"
    """Lowest level that is logged."""
    log_format: Literal["json", "text"] = "json"
    """Format of log lines: json or text."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the given values: `Settings()` always has the defaults, and `load` reads an environment."""
        return (init_settings,)

    @field_validator("default_output")
    @classmethod
    def _an_output(cls, text: str) -> str:
        if text:
            try:
                TypeAdapter(Output).validate_python(text)
            except ValidationError as error:
                raise ValueError(error.errors()[0]["msg"]) from None
        return text

    @classmethod
    def variable(cls, field: str) -> str:
        """Return the name of a field's variable."""
        return PREFIX + field.upper()

    @property
    def holder(self) -> str:
        """Return this process's name in the Lease."""
        return self.identity or f"{socket.gethostname()}_{os.getpid()}"


def load(environ: Mapping[str, str]) -> Settings:
    """Read the settings from an environment. Raises a `UserError` with the variable if it is invalid or unknown.

    Kubernetes adds variables with the same prefix for a Service called egm-operator; they are ignored.
    """
    known = {Settings.variable(field) for field in Settings.model_fields}
    for name in environ:
        if name.startswith(PREFIX) and name not in known and not _OF_A_SERVICE.search(name):
            raise UserError("is not a setting of the operator", field=name, hint="docs/operator.md lists the settings.")
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): text.strip() for name, text in environ.items() if text.strip()}
    try:
        return Settings(**source())
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise UserError(f"{first['msg']}, found {first['input']!r}", field=Settings.variable(field)) from None


def table() -> str:
    """Return the Markdown table of the settings."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for field, info in Settings.model_fields.items():
        default = str(info.default).lower() if isinstance(info.default, bool) else str(info.default or "")
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{Settings.variable(field)}` | {shown} | {info.description} |")
    return "\n".join(lines) + "\n"
