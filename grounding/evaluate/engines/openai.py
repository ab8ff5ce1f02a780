"""Any hosted service with OpenAI's chat completions. This project does not start it, and it has no metrics."""

from __future__ import annotations

from grounding.errors import UserError
from grounding.evaluate.engines.base import Engine, Pages, ServeOptions
from grounding.evaluate.served import ServedModel, listed
from grounding.jsontypes import Document
from grounding.sampling import Sampling


def command(model: str, options: ServeOptions) -> list[str]:
    """Raise `UserError`, because the service runs elsewhere."""
    raise UserError("the engine openai is a service that is already running", hint="Give its URL with --endpoint.")


def request_extras(sampling: Sampling) -> Document:
    """Return the fields that OpenAI's own service accepts. It refuses `max_tokens`, `top_k` and `repetition_penalty`."""
    fields: Document = {
        "max_completion_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
    }
    return fields if sampling.seed is None else fields | {"seed": sampling.seed}


def served(pages: Pages, asked_as: str | None) -> ServedModel:
    """Return the model with the name under which the service lists it."""
    return ServedModel(id=listed(pages.get("models"), asked_as).id)


ENGINE = Engine(
    name="openai",
    command=command,
    env={},
    readiness="/v1/models",
    request_extras=request_extras,
    info_pages={"models": ("/v1/models",)},
    served=served,
    limit_field="max_completion_tokens",
)
