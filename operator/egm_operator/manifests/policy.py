"""Check a job's podTemplate against the administrator's setting: the restricted Pod Security level and a few more rules. Pure.

The merged pod is checked, not the template, so that no template can remove the restrictions of our pods
(https://kubernetes.io/docs/concepts/security/pod-security-standards/). The rule for Secrets is our addition: otherwise, anyone who may
create jobs could read every Secret of the namespace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from egm_operator.kube.objects import entries, section, text
from egm_operator.settings import Settings
from grounding.errors import UserError

Raw = Mapping[str, Any]
_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")
_HINT = (
    "Leave it out, or ask the administrator to change the operator's setting podTemplate (allow, restricted or deny), or for "
    "Secrets podTemplateSecrets."
)


def enforce(pod: Raw, template: object, field: str, settings: Settings, own_secrets: frozenset[str]) -> None:
    """Raise a `UserError` with the field if a job's `template` gives its pod more rights than the settings allow.

    `field`: path of the template in the job. `own_secrets`: Secrets that the operator's own template uses.
    """
    if not template or settings.pod_template == "allow":
        return
    if settings.pod_template == "deny":
        raise UserError("the administrator does not allow a podTemplate", field=field, hint=_HINT)
    for place, sentence in violations(pod, settings, own_secrets):
        raise UserError(sentence, field=f"{field}.spec.{place}", hint=_HINT)


def violations(pod: Raw, settings: Settings, own_secrets: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the field of a pod's spec and a sentence for each violation of the level `restricted`."""
    for name in _HOST:
        if pod.get(name) is (name != "hostUsers"):
            yield name, "jobs must not use the node's namespaces"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken", "jobs must not have a service account token"
    account = text(pod, "serviceAccountName") or text(pod, "serviceAccount")
    if account != settings.service_account:
        yield "serviceAccountName", f"{account!r} is not the service account of jobs"
    if pod.get("ephemeralContainers"):
        yield "ephemeralContainers", "cannot be part of a template"
    level = section(pod, "securityContext")
    if level.get("sysctls"):
        yield "securityContext.sysctls", "jobs must not change kernel settings"
    yield from _volumes(pod, settings, own_secrets)
    for part in ("initContainers", "containers"):
        for index, container in enumerate(entries(pod, part)):
            for field, sentence in _container(container, level, settings, own_secrets):
                yield f"{part}[{index}].{field}", sentence


def _volumes(pod: Raw, settings: Settings, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    for index, volume in enumerate(entries(pod, "volumes")):
        kinds = set(volume) - {"name"}
        for kind in sorted(kinds - _VOLUMES):
            yield f"volumes[{index}].{kind}", f"jobs must not use volumes of the kind {kind}"
        names = [section(volume, "secret").get("secretName")]
        names += [section(s, "secret").get("name") for s in entries(volume, "projected", "sources")]
        for name in names:
            if name is not None and not _named(name, settings, own):
                yield f"volumes[{index}]", f"jobs must not read the Secret {name!r}"
        if any("serviceAccountToken" in s for s in entries(volume, "projected", "sources")):
            yield f"volumes[{index}].projected", "jobs must not have a service account token"


def _named(secret: object, settings: Settings, own: frozenset[str]) -> bool:
    return secret in own or secret in settings.pod_template_secrets


def _words(of: Raw, name: str) -> list[str]:
    found = of.get(name)
    return [str(word) for word in found] if isinstance(found, list) else []


def _container(found: Raw, level: Raw, settings: Settings, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the violations of a container. Fields that it does not set are taken from its pod."""
    image = text(found, "image")
    if settings.image_registries and not image.startswith(tuple(f"{r}/" for r in settings.image_registries)):
        yield "image", f"{image!r} is not from an allowed registry ({', '.join(settings.image_registries)})"
    context = section(found, "securityContext")
    where = "securityContext"
    if context.get("privileged"):
        yield f"{where}.privileged", "jobs must not use privileged containers"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{where}.allowPrivilegeEscalation", "must be false"
    capabilities = section(context, "capabilities")
    if "ALL" not in _words(capabilities, "drop"):
        yield f"{where}.capabilities.drop", "must contain ALL"
    if more := sorted(set(_words(capabilities, "add")) - {"NET_BIND_SERVICE"}):
        yield f"{where}.capabilities.add", f"jobs must not add {', '.join(more)}"
    if context.get("procMount") not in (None, "Default"):
        yield f"{where}.procMount", "must be Default"
    if context.get("runAsNonRoot", level.get("runAsNonRoot")) is not True:
        yield f"{where}.runAsNonRoot", "must be true"
    if context.get("runAsUser", level.get("runAsUser")) == 0:
        yield f"{where}.runAsUser", "jobs must not run as root"
    profile = section(context, "seccompProfile") or section(level, "seccompProfile")
    if profile.get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{where}.seccompProfile", "must be of the type RuntimeDefault or Localhost"
    if any(section(each, "appArmorProfile").get("type") == "Unconfined" for each in (context, level)):
        yield f"{where}.appArmorProfile", "must not be Unconfined"
    if any(port.get("hostPort") for port in entries(found, "ports")):
        yield "ports", "jobs must not use ports of the node"
    yield from _environment(found, settings, own)


def _environment(found: Raw, settings: Settings, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    for part, reference in (("env", "secretKeyRef"), ("envFrom", "secretRef")):
        for index, entry in enumerate(entries(found, part)):
            source = section(entry, "valueFrom") if part == "env" else entry
            name = section(source, reference).get("name")
            if name is not None and not _named(name, settings, own):
                yield f"{part}[{index}]", f"jobs must not read the Secret {name!r}"
