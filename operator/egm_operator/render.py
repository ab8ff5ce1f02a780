"""`egm render`: the objects that the operator would make for a job, in the order in which it would make them. Pure but for reading files."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from egm_operator.build import batch, pytorchjob, servers
from egm_operator.build.places import model_left_by, output_of, places
from egm_operator.build.pod import Context, Raw
from egm_operator.settings import Settings
from grounding.api import GroundingTrainJob, Job, load
from grounding.errors import UserError
from grounding.roles import plan as plan_roles

UID = "00000000-0000-0000-0000-000000000000"
"""Stands for the uid that the API server gives."""


def objects(job: Job, upstream: Job | None, settings: Settings, namespace: str) -> list[Raw]:
    """Objects of a job's first attempt. `upstream`: the train job that its model comes from. Raises `UserError`."""
    namespace = job.metadata.namespace or namespace
    output = output_of(job, namespace, settings.default_output)
    if not output:
        hint = "Set spec.output (pvc://claim/path or s3://bucket/path), or EGM_DEFAULT_OUTPUT as the operator has it."
        raise UserError("is missing", field=f"{job.metadata.name}: spec.output", hint=hint)
    reference = job.spec.model
    model = reference.source or ""
    if reference.train_job:
        left = model_left_by(upstream, namespace, settings.default_output) if upstream is not None else ""
        model = left or f"model-of://{reference.train_job}"
    where = places(job, model, output)
    ctx = Context(job, namespace, UID, where, settings)
    roles = {r.name: r for r in plan_roles(job, where.layout)}
    first = batch.prepare(roles["prepare"], ctx)
    if isinstance(job, GroundingTrainJob):
        return [
            *([first] if where.shared else []),
            *pytorchjob.wanted(roles[job.spec.method], roles["prepare"], ctx, 1),
        ]
    found, urls = [first], list[str]()
    if "server" in roles:
        urls = servers.endpoints(roles["server"], ctx)
        found += [
            servers.service(ctx),
            *(servers.server(roles["server"], ctx, i) for i in range(roles["server"].replicas)),
        ]
    return [*found, batch.client(roles["evaluate"], roles["prepare"], ctx, 1, urls)]


def render(files: Sequence[Path], settings: Settings, namespace: str) -> str:
    """YAML of all jobs of the files. Raises `UserError`."""
    from ruamel.yaml import YAML

    jobs = [job for file in files for job in load(file)]
    trains = {j.metadata.name: j for j in jobs if isinstance(j, GroundingTrainJob)}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda _: True  # people read this
    out = StringIO()
    for job in jobs:
        for obj in objects(job, trains.get(job.spec.model.train_job or ""), settings, namespace):
            out.write(f"---\n# {job.kind} {job.metadata.name}: {obj['kind']}\n")
            yaml.dump(obj, out)
    return out.getvalue()
