"""Decide to which servers a tracking key of the environment may be sent: its own, and those that the administrator or user allows. Pure.

A manifest from someone else may contain any server as the target of metrics. The key of the user who submits it must not be sent there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

PUBLIC_WANDB = "https://api.wandb.ai"
_PORTS = {"http": 80, "https": 443}
_MLFLOW = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
)
"""Variables with which MLflow adds credentials to its requests, whatever the server"""


def server_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL. Raises `ValueError` if it has no host or an invalid port."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise ValueError(f"{url!r} has no host")
    return parts.scheme, host, parts.port or _PORTS.get(parts.scheme, 0)


def may_have_it(url: str, home: str, allowed: Collection[str]) -> bool:
    """Return whether a key for the server `home` (empty: for none) may be sent to `url`. `allowed`: further hosts, `host` or `host:port`."""
    try:
        server = server_of(url)
        own = server_of(home) if home else None
    except ValueError:
        return False
    named = {host.lower().rstrip(".") for host in allowed}
    return server == own or server[1] in named or f"{server[1]}:{server[2]}" in named


def wandb_home(environ: Mapping[str, str]) -> str:
    """Return the server to which `WANDB_API_KEY` belongs."""
    return environ.get("WANDB_BASE_URL") or PUBLIC_WANDB


def keeps_wandb_key(url: str, environ: Mapping[str, str], allowed: Collection[str]) -> str:
    """Return why the environment's key must not be sent to `url`; empty if it may, or if there is no key."""
    home = wandb_home(environ)
    if not environ.get("WANDB_API_KEY") or may_have_it(url, home, allowed):
        return ""
    return f"WANDB_API_KEY belongs to {home}; {_remedy('WANDB_BASE_URL', url)}"


def keeps_mlflow_key(uri: str, environ: Mapping[str, str], has_file: bool, allowed: Collection[str]) -> str:
    """Return why MLflow's credentials must not be sent to the server `uri`; empty if they may, or if there are none.

    `has_file`: whether MLflow's own file of credentials exists. A store that is not a server gets no credentials.
    """
    found = [name for name in _MLFLOW if environ.get(name)] or (["MLflow's file of credentials"] if has_file else [])
    home = environ.get("MLFLOW_TRACKING_URI", "")
    if not found or urlsplit(uri).scheme not in _PORTS or may_have_it(uri, home, allowed):
        return ""
    return f"{found[0]} belongs to {home or 'no server in the environment'}; {_remedy('MLFLOW_TRACKING_URI', uri)}"


def _remedy(variable: str, url: str) -> str:
    return f"set {variable}={url} if it belongs to the job's server, or add the server's host to EGM_TRACKING_HOSTS"
