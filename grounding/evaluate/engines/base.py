"""What an engine is: a name and how to start, watch and talk to its server. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grounding import flashinfer
from grounding.evaluate.engines.metrics import Metrics, read_metrics


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are EGM's (greedy, since the temperature is 0)."""

    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 20
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ServeOptions:
    """How to serve. `served_name` is the model's name in requests; `gpus` copies of the model run side by side, one a GPU; 0: one on the CPU.

    `max_length` bounds a request, prompt and answer together, in tokens.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    served_name: str = ""
    gpus: int = 1
    max_length: int = 32768


@dataclass(frozen=True)
class Routing:
    """How a request names the copy of the model that is to answer it, where one server holds several (data parallelism).

    `field` stands in the body, `header` in the head; both empty: not at all.
    """

    copies: int = 1
    field: str = ""
    header: str = ""


@dataclass(frozen=True)
class Engine:
    """One kind of server.

    `command(model, options)` is the argv (its first word `python`, or a program beside the interpreter); `env` and, without a GPU, `cpu_env` are
    added to the process's; `readiness` is a path that answers 200 once the model answers; `request_extras(sampling)` are the request's fields;
    `names_model` is whether requests carry a model name at all; `rank_field` and `rank_header` are where a request says which data-parallel
    copy is to answer it; `metric_names` are the samples of `/metrics` (field of `Metrics` -> name), empty where there are none.

    SIGTERM stops each of them: requests in flight are answered first, for `grace_s` seconds; who stops it kills it then.
    """

    name: str
    command: Callable[[str, ServeOptions], list[str]]
    env: dict[str, str]
    readiness: str
    request_extras: Callable[[Sampling], dict[str, Any]]
    names_model: bool = True
    rank_field: str = ""
    rank_header: str = ""
    cpu_env: dict[str, str] = field(default_factory=dict)
    metric_names: dict[str, str] = field(default_factory=dict)
    grace_s: float = 30.0

    def environment(self, environ: Mapping[str, str], *, gpus: int) -> dict[str, str]:
        """What to add to `environ` for the server; what the user has set stands. FlashInfer is off unless `EGM_FLASHINFER=1`."""
        wanted = (self.env if gpus else self.env | self.cpu_env) | flashinfer.environment(environ)
        return {name: value for name, value in wanted.items() if name not in environ}

    def metrics(self, text: str) -> Metrics:
        """What the text of `/metrics` says. Raises `ValueError` for another format."""
        return read_metrics(text, self.metric_names)

    def routing(self, copies: int) -> Routing:
        """How a request names one of `copies` copies of the model behind an endpoint."""
        return Routing(copies, self.rank_field, self.rank_header)


def all_fields(sampling: Sampling) -> dict[str, Any]:
    """Every sampling field, for servers that know them all."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }
