"""Turn a local reward file of the submitting machine into a ConfigMap that the job's pods mount.

The ConfigMap's name contains a digest of the content. A changed file therefore changes the job's spec, which the API server refuses.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from egm_operator.kinds import CONFIG_MAP, JOBS, TRAIN_JOB
from egm_operator.kube.objects import Manifest
from egm_operator.names import LABEL_JOB, LABEL_KIND, child, label_value, prefix
from grounding.api import GroundingTrainJob, Job
from grounding.api.common import ConfigMapKey
from grounding.errors import UserError

KEY = "reward.py"
LIMIT = 1 << 20
"""Maximum size of a ConfigMap's values in bytes"""


def in_config_map(job: Job, namespace: str) -> tuple[Job, Manifest | None]:
    """Return the job for a cluster, and the ConfigMap that must exist before it.

    If the reward is not a local file, return the job unchanged and None. Raises `UserError` if the file is too large.
    """
    file = file_here(job.spec.reward.file) if isinstance(job, GroundingTrainJob) else None
    if file is None or not isinstance(job, GroundingTrainJob):
        return job, None
    made = config_map(job.metadata.name, namespace, file)
    key = ConfigMapKey(name=made["metadata"]["name"], key=KEY)
    reward = job.spec.reward.model_copy(update={"file": None, "config_map": key})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"reward": reward})}), made


def file_here(source: str | None) -> Path | None:
    """Return the local file of `spec.reward.file`; None if it is a URI, or a path that does not exist here."""
    if source is None:
        return None
    if source.startswith("file://"):
        source = unquote(urlsplit(source).path)
    file = Path(source)
    return file if "://" not in source and file.is_file() else None


def config_map(job: str, namespace: str, file: Path) -> Manifest:
    """Return the ConfigMap with a train job's reward file. Raises `UserError` if the file is too large."""
    content = file.read_bytes()
    if len(content) > LIMIT:
        raise UserError(
            f"the file has {len(content):,} bytes, but a ConfigMap can have at most {LIMIT:,}",
            file=file,
            field="spec.reward.file",
            hint="Move data such as tables into a separate file, or put the file on a claim (pvc://claim/path), s3:// or hf://.",
        )
    digest = hashlib.sha256(content).hexdigest()
    labels = {
        "app.kubernetes.io/managed-by": "egm",
        "app.kubernetes.io/part-of": "egm",
        LABEL_JOB: label_value(job),
        LABEL_KIND: JOBS[TRAIN_JOB.name].short,
    }
    name = child(prefix(TRAIN_JOB.name, job), f"reward-{digest[:10]}", 63)
    made: Manifest = {
        "apiVersion": CONFIG_MAP.api_version,
        "kind": CONFIG_MAP.name,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "immutable": True,
    }
    try:
        made["data"] = {KEY: content.decode()}
    except UnicodeDecodeError:
        made["binaryData"] = {KEY: base64.b64encode(content).decode()}
    return made
