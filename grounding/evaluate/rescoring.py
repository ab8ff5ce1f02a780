"""Score a folder's stored answers again, using only what the folder contains: `egm rescore DIR`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from grounding import defaults
from grounding.data.spaces import parse_space
from grounding.errors import UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.guard import Truths
from grounding.evaluate.method import method_of
from grounding.evaluate.results.config import FILE
from grounding.evaluate.summary_model import summary_of
from grounding.evaluate.sweep import is_sweep
from grounding.files import read_json
from grounding.jsontypes import JsonObject
from grounding.sampling import Sampling


def stored_evaluation(folder: Path, scoring: str = "") -> Evaluation:
    """Return the evaluation in `folder`, to be scored by the profile `scoring` (empty: its previous one). Raises `UserError` if it cannot be.

    Everything else comes from `run_config.json`: the files, the model, the prompt and the settings that are part of an answer's identity.
    """
    path = folder / FILE
    if is_sweep(folder):
        raise UserError(
            "each setting of a sweep must be scored again separately",
            file=folder,
            hint=f"Use egm rescore {folder}/settings/NAME.",
        )
    if not path.is_file():
        raise UserError("this folder has no evaluation: run_config.json is absent", file=folder)
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("expected a JSON object", file=path)
    files = [Path(str(f)) for f in _list(config, "files", path)]
    for file in files:
        if not file.is_file():
            text = "is needed for scoring again, because it contains the true boxes"
            raise UserError(text, file=file, hint=f"Put the file there, or correct `files` in {path}.")
    known = {f.name for f in fields(Sampling)}
    drawn = config.get("sampling") or {k: v for k, v in dict(config.get("request") or {}).items() if k in known}
    try:
        sampling = Sampling(**drawn)
    except TypeError as error:
        raise UserError(f"sampling: {error}", file=path) from None
    body = config.get("body") or {}
    request = Request(
        _asked_as(config, folder), str(config.get("prompt")), system=str(config.get("system") or ""), body=body
    )
    limit = config.get("limit")
    return Evaluation(
        tuple(files),
        (),
        folder,
        str(config.get("model")),
        Options((), request, method=method_of(config.get("method"))),
        sampling,
        scoring or str(config.get("scoring") or defaults.SCORING),
        limit if isinstance(limit, int) else None,
        rescore=True,
        max_errors=most if isinstance(most := config.get("max_errors"), int) else 0,
        mode=str(config.get("mode") or defaults.MODE),
        truths=Truths(parse_space(config.get("truth"), f"{path}: truth")),
    )


def _asked_as(config: JsonObject, folder: Path) -> str | None:
    """Return the model's name in requests. Earlier releases did not store it, but wrote a note if the server's name differed."""
    noted = any("the model that was asked for is" in n for n in summary_of(folder).notes)
    name = config.get("asked_as", config.get("model") if noted else None)
    return name if isinstance(name, str) else None


def _list(config: JsonObject, name: str, path: Path) -> list[Any]:
    value = config.get(name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: expected a list", file=path)
    return value
