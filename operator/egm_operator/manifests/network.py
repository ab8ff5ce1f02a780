"""Build the NetworkPolicy of a job: its pods can reach each other, and otherwise only readers of their progress and metrics are allowed. Pure.

There is one policy per job, not per namespace, because only the job's uid distinguishes its pods from those of other jobs.
"""

from __future__ import annotations

from dataclasses import replace

import orjson

from egm_operator.kinds import NETWORK_POLICY
from egm_operator.kube.objects import Manifest
from egm_operator.manifests.pod import Context, unique
from egm_operator.names import LABEL_UID, PROGRESS_PORT, SERVER_PORT
from grounding.jsontypes import Document

_DNS = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}


def wanted(ctx: Context) -> list[Manifest]:
    """Return the policy, which must be created before any pod; empty if policies are disabled."""
    return [_policy(ctx)] if ctx.settings.network_policies else []


def _policy(ctx: Context) -> Manifest:
    settings, own = ctx.settings, {"podSelector": {"matchLabels": {LABEL_UID: ctx.uid}}}
    egress = orjson.loads(settings.network_egress)
    spec: Document = {
        **own,
        "policyTypes": ["Ingress", "Egress"] if egress else ["Ingress"],
        "ingress": [
            {"from": [own]},
            *_from(settings.network_telemetry_from, PROGRESS_PORT),
            *_from(settings.network_scrape_from, PROGRESS_PORT, SERVER_PORT),
        ],
    }
    if egress:
        spec["egress"] = [{"to": [own]}, _DNS, *egress]
    meta = replace(ctx, model=None).meta(unique(ctx, "network"), "network")
    return {"apiVersion": NETWORK_POLICY.api_version, "kind": NETWORK_POLICY.name, "metadata": meta, "spec": spec}


def _from(peers: str, *ports: int) -> list[Document]:
    """Return the rule that allows peers to reach some ports. Return no rule without peers, because an empty list would allow everyone."""
    found = orjson.loads(peers)
    return [{"from": found, "ports": [{"protocol": "TCP", "port": port} for port in ports]}] if found else []
