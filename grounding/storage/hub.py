"""The Hugging Face hub, by `huggingface_hub`: it resumes, verifies and locks by itself; here its errors become sentences."""

from __future__ import annotations

from pathlib import Path

from grounding.errors import Failure, UserError


def fetch_hub(repository: str, path: str) -> Path:
    """A local folder (or file, where `path` names one) of `owner/name` or `owner/name@revision`, fetched into the hub's own cache."""
    try:
        from huggingface_hub import errors, hf_hub_download, snapshot_download
    except ModuleNotFoundError:
        raise UserError(
            "hf:// needs huggingface_hub, which is not installed",
            hint="Install the extra that holds it: pip install 'egm-grounding[train]'.",
        ) from None
    name, _, revision = repository.partition("@")
    where = f"hf://{repository}"
    try:
        if path and "." in Path(path).name:
            return Path(hf_hub_download(name, path, revision=revision or None))
        patterns = [f"{path}/*"] if path else None
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns)) / path
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise UserError(
            "the hub has no such repository, revision or file, or it is closed to you",
            file=where,
            hint="Check the name; for a gated model set HF_TOKEN.",
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise Failure(f"cannot be fetched: {str(error).splitlines()[0]}", file=where) from None
