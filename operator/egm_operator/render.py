"""`egm render`: return the objects that the operator would create for a job, in order of creation. Pure except for reading files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from egm_operator.kube.objects import Manifest
from egm_operator.manifests import batch, gangs, network, own_reward, servers
from egm_operator.manifests.places import check_for_pods, model_left_by, output_of, places
from egm_operator.manifests.pod import Context
from egm_operator.plan.snapshot import roles_of
from egm_operator.settings import Settings
from grounding.api import GroundingTrainJob, Job, load
from grounding.api.handed_down import queue_of
from grounding.errors import UserError

UID = "00000000-0000-0000-0000-000000000000"
"""Placeholder for the uid that the API server assigns"""


def objects(job: Job, trains: Mapping[str, Job], settings: Settings, namespace: str) -> list[Manifest]:
    """Return the objects of a job's first attempt. `trains`: train jobs by name, whose models the job may use. Raises `UserError`."""
    namespace = job.metadata.namespace or namespace
    output = output_of(job, namespace, settings.default_output)
    if not output:
        hint = "Set spec.output (pvc://claim/path or s3://bucket/path), or EGM_OPERATOR_DEFAULT_OUTPUT to the operator's value."
        raise UserError("is missing", field=f"{job.metadata.name}: spec.output", hint=hint)
    check_for_pods(job)
    found: list[Manifest] = []
    several = not isinstance(job, GroundingTrainJob) and bool(job.spec.several_models)
    for number, reference in enumerate(job.spec.models, 1):
        model = reference.source or ""
        if reference.train_job:
            upstream = trains.get(reference.train_job)
            left = model_left_by(upstream, namespace, settings.default_output) if upstream is not None else ""
            model = left or f"model-of://{reference.train_job}"
        where = places(job, model, output)
        ctx = Context(job, namespace, UID, where, settings, number if several else None)
        found += _of_model(ctx, first=number == 1)
    # some objects are created again by each attempt
    named = {(obj["kind"], obj["metadata"]["name"]): obj for obj in reversed(found)}
    return [obj for obj in found if named.pop((obj["kind"], obj["metadata"]["name"]), None) is not None]


def _of_model(ctx: Context, first: bool) -> list[Manifest]:
    """Return the objects of a model's first attempt. Objects that all models of a sweep share are returned for the `first` model."""
    job, roles = ctx.job, {r.name: r for r in roles_of(ctx)}
    data = batch.prepare(roles["prepare"], ctx)
    if isinstance(job, GroundingTrainJob):
        backend = gangs.chosen(job.spec.backend, ctx.settings.backend, absent=frozenset())
        return [
            *([*network.wanted(ctx), data] if ctx.places.shared else []),
            *backend.wanted(roles[job.spec.method], roles["prepare"], ctx, 1),
        ]
    found, urls = [*network.wanted(ctx), data] if first else [], list[str]()
    if "server" in roles:
        role = roles["server"]
        urls = servers.endpoints(role, ctx)
        groups: list[servers.Group | None] = [None] * role.replicas
        if queue_of(job):
            groups = [*servers.new_groups(min(job.spec.min_servers, role.replicas), ctx, 0.0, role.replicas)]
        found += servers.shared(ctx) if first else []
        found += [servers.server(role, ctx, index, group) for index, group in enumerate(groups)]
    return [*found, batch.client(roles["evaluate"], roles["prepare"], ctx, 1, urls)]


def render(files: Sequence[Path], settings: Settings, namespace: str) -> str:
    """Return the YAML of the objects of all jobs in the files. Raises `UserError`."""
    from ruamel.yaml import YAML

    jobs = [job for file in files for job in load(file)]
    trains = {j.metadata.name: j for j in jobs if isinstance(j, GroundingTrainJob)}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda _: True  # repeat values, which is easier to read
    out = StringIO()
    for written in jobs:
        job, config_map = own_reward.in_config_map(written, written.metadata.namespace or namespace)
        for obj in [*([] if config_map is None else [config_map]), *objects(job, trains, settings, namespace)]:
            out.write(f"---\n# {job.kind} {job.metadata.name}: {obj['kind']}\n")
            yaml.dump(obj, out)
    return out.getvalue()
